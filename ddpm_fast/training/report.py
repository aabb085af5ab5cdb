"""What a training run says of itself when it begins."""

from __future__ import annotations

from .step import Trainer


def begin_lines(trainer: Trainer, start: int) -> list[str]:
    """The images, the network, and the steps from ``start`` on: a line each."""
    model, config, device = trainer.model.config, trainer.config, str(trainer.device)
    channels, height, width = trainer.data.image_shape
    parameters = sum(p.numel() for p in trainer.model.parameters())
    images = f"{width}x{height} images of {channels} channel{'s' * (channels != 1)}"
    network = f"network: {parameters:,} parameters for {images}"
    if model.num_class_embeds is None:
        network += ", without classes"
    elif config.label_dropout > 0:
        network += f", {trainer.data.num_classes} classes; {100 * config.label_dropout:g} % of the labels are dropped"
    else:
        network += f", {model.num_class_embeds} classes"
    steps = f"training: steps {start:,} to {config.steps:,}"
    if start:
        steps = f"training: continues at step {start:,} of {config.steps:,}, {max(0, config.steps - start):,} to go"
    batch = f"batches of {config.batch_size}" + f" over {trainer.world.size} processes" * (trainer.world.size > 1)
    dtype = str(trainer.dtype).removeprefix("torch.")
    return [f"data: {trainer.data.describe()}", network, f"{steps}, {batch}, {dtype} on {device}"]
