"""lucidrains' denoising-diffusion-pytorch: a Trainer's ``model-N.pt``, a GaussianDiffusion's state dict or a Unet's.

Shapes tell the network, the diffusion's buffers the schedule and mostly the objective. What leaves no trace comes from
the version (recorded in a Trainer's file, or a preset) or from overrides in the package's own argument names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..schedule import TRUNCATED, Schedule
from .family import Checkpoint, Found, check_names, check_storage, fit
from .files import CheckpointError, first_line
from .layout import CONFIG
from .lucidrains_layout import Parts, inferred, split, versions
from .lucidrains_schedule import OBJECTIVES, SCHEDULES, betas_of, named_betas, objective_of
from .lucidrains_unet import LucidrainsConfig, LucidrainsUnet
from .lucidrains_versions import FLAT, LAST, PACKAGE, SPANS, Version, arithmetic, defaults, is_version, version

MAX_TIMESTEPS = 1_000_000

_ARCHITECTURE = (  # in the file for all to see: checked, not needed
    "dim",
    "init_dim",
    "dim_mults",
    "channels",
    "out_dim",
    "self_condition",
    "learned_variance",
    "full_attn",
    "learned_sinusoidal_dim",
)
_NETWORK = ("attn_heads", "attn_dim_head", "resnet_block_groups", "sinusoidal_pos_emb_theta")
_DIFFUSION = ("image_size", "timesteps", "objective", "beta_schedule", "auto_normalize")
_SAMPLING = ("sampling_timesteps", "ddim_sampling_eta", "rederive_pred_noise")
_WITHOUT_EFFECT = (
    "dropout",
    "flash_attn",
    "learned_sinusoidal_cond",
    "random_fourier_features",
    "immiscible",
    "loss_type",
    "min_snr_gamma",
    "min_snr_loss_weight",
    "offset_noise_strength",
    "p2_loss_weight_gamma",
    "p2_loss_weight_k",
)
KNOWN = (*_ARCHITECTURE, *_NETWORK, *_DIFFUSION, *_SAMPLING, *_WITHOUT_EFFECT)


def recorded(content: Any) -> dict[str, Any]:
    """What a Trainer's file says beside its tensors: whether it has averages, and the package's version."""
    if not isinstance(content, dict) or not {"ema", "model"} <= set(content):
        return {}
    version = {"version": content["version"]} if isinstance(content.get("version"), str) else {}
    return {"averaged": bool(content["ema"]), **version}


def load(found: Found) -> Checkpoint:
    """The model and schedule of a state dict in lucidrains' names. CheckpointError, one line."""
    check_names(found.overrides, KNOWN, "override of a lucidrains checkpoint")
    notes = list(found.notes)
    if found.config is not None:
        notes.append(f"the {CONFIG} beside the file is not used: these are lucidrains' names")
    parts = split(found.tensors, found.prefix, found.beside, found.weights)
    check_storage(found, parts.network | parts.buffers)
    if not found.recorded.get("averaged", True):
        notes.append("the file has no averaged weights (EMA); the model's own are used, which sample worse")
    settings = _Settings(found, parts, notes)
    config = settings.network()
    schedule = settings.schedule(config)
    try:
        with torch.device("meta"):  # no memory and no random numbers for what the file is about to give
            model = LucidrainsUnet(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found.weights} cannot be built as its shapes say: {first_line(error)}") from None
    notes += fit(model, found, parts.network)
    settings.say(config)
    return Checkpoint(model, schedule, found.source, "lucidrains", notes, found.labels)


class _Settings:
    """What the file, the version and the overrides say, and the notes of which said what."""

    def __init__(self, found: Found, parts: Parts, notes: list[str]):
        self.found, self.parts, self.notes, self.given = found, parts, notes, dict(found.overrides)
        self.shapes = {name: tuple(t.shape) for name, t in parts.network.items()}
        self.shown = inferred(self.shapes, found.weights)
        self.assumed: dict[str, Any] = {}
        self.version = self._version()
        # A version that is named stands for its defaults; one that is only recorded, for its arithmetic.
        self.defaults = defaults(self.version) if self.version is not None and found.preset is not None else {}

    def _version(self) -> Version | None:
        first, end = versions(self.shapes, self.parts.nested)
        named, saved = self.found.preset, self.found.recorded.get("version")
        if not self.parts.nested and saved is not None and not is_version(saved):
            saved = None  # a fork's; nothing depends on it
        text = named if named is not None else saved
        if text is None:
            if not self.parts.nested:
                return None
            spans = SPANS[self.shown["downsample"]]
            raise CheckpointError(
                f"{self.found.weights} is a lucidrains checkpoint of a version from {first} to before {end}; these "
                f"differ in their arithmetic without a trace in the file (alike are {spans}): name the version that "
                f"trained it, like --weights-preset {'1.7.1' if end == FLAT else '0.28.0'}"
            )
        chosen = version(text)
        how = f"preset {named!r}" if named is not None else f"the version {saved} that the file records"
        if not first <= chosen < end:
            if named is None and not self.parts.nested:  # a fork's own number; nothing depends on it
                self.notes.append(f"{how} is not one of this network; it is not used")
                return None
            span = f"{first} or later" if end == LAST else f"{first} to before {end}"
            raise CheckpointError(
                f"{how} does not fit {self.found.weights}, whose network is as in {span}"
                + ("" if named is not None else "; name the right one as a preset (--weights-preset VERSION)")
            )
        if named is not None and saved is not None and saved != str(chosen):
            self.notes.append(f"the file records version {saved}; the preset's is used")
        return chosen

    def network(self) -> LucidrainsConfig:
        shown = dict(self.shown)
        fields: dict[str, Any] = {}
        if self.parts.nested:
            assert self.version is not None
            fields = arithmetic(self.version)
            said = ", ".join(f"{k}={v!r}" for k, v in fields.items())
            self.notes.append(f"by version {self.version}: {said}")
        if "inner" in shown:
            shown |= self._heads(shown.pop("inner"))
        if shown["block_norm"] == "group":
            shown["resnet_block_groups"] = self._number("resnet_block_groups", 8)
        if shown["learned_sinusoidal_dim"] is None:
            theta = self._number("sinusoidal_pos_emb_theta", 10000, whole=False)
            shown["sinusoidal_pos_emb_theta"] = theta
        config = LucidrainsConfig(**{**shown, **fields}, image_size=self._image_size())
        self._check_architecture(config)
        groups = config.resnet_block_groups
        odd = [w for w in (config.init_dim, *config.widths) if config.block_norm == "group" and w % groups]
        if odd:
            raise CheckpointError(f"resnet_block_groups={groups} does not divide {odd[0]} channels; give the right one")
        if self.parts.wrapped and not self.parts.buffers and config.learned_sinusoidal_dim is not None:
            raise CheckpointError(
                f"{self.found.weights} is a lucidrains checkpoint of a diffusion in continuous time, without betas "
                "(ContinuousTimeGaussianDiffusion or VParamContinuousTimeGaussianDiffusion); it is no DDPM and is not "
                "supported: draw from it with that class"
            )
        return config

    def _heads(self, inner: tuple[int, ...]) -> dict[str, Any]:
        """Before 1.9.0 only heads times their channels show."""
        width = inner[0]
        if len(set(inner)) > 1:
            raise CheckpointError(f"{self.found.weights} has attention of several widths {list(inner)} without mem_kv")
        heads, dim_head = self.given.get("attn_heads"), self.given.get("attn_dim_head")
        if heads is None and dim_head is None and width != 128:
            raise CheckpointError(
                f"{self.found.weights}: its attention has {width} channels, not the default 4 heads of 32, and the "
                "weights do not tell the heads: give attn_heads (--set attn_heads=N)"
            )
        if heads is None and dim_head is None:
            self.assumed |= {"attn_heads": 4, "attn_dim_head": 32}
            heads, dim_head = 4, 32
        for name, value in (("attn_heads", heads), ("attn_dim_head", dim_head)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise CheckpointError(f"override {name} must be a positive whole number; got {value!r}")
        heads = int(heads or width // int(dim_head or width))
        if heads * int(dim_head or width // heads) != width:
            raise CheckpointError(f"attn_heads={heads} of attn_dim_head={dim_head} do not make {width} channels")
        return {"attn_heads": (heads,) * len(inner), "attn_dim_head": (width // heads,) * len(inner)}

    def _number(self, name: str, default: int, whole: bool = True) -> Any:
        value = self.given.get(name)
        if value is None:
            self.assumed[name] = default
            return default
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 1 <= value < 1e9:
            raise CheckpointError(f"override {name} must be a positive {'whole ' * whole}number; got {value!r}")
        return value

    def _image_size(self) -> tuple[int, int] | None:
        size = self.given.get("image_size")
        if size is None:
            return None
        pair = [size, size] if isinstance(size, int) else size
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise CheckpointError(f"override image_size must be a whole number or two of them; got {size!r}")
        factor = 2 ** (len(self.shown["widths"]) - 1)
        for side in pair:
            if not isinstance(side, int) or isinstance(side, bool) or side < 1 or side % factor:
                raise CheckpointError(f"override image_size must be divisible by {factor} for this U-Net; got {size!r}")
        return pair[0], pair[1]

    def _check_architecture(self, config: LucidrainsConfig) -> None:
        """That arguments which the file shows, where given, say what it says."""
        actual = config.to_dict()
        for name in (*_ARCHITECTURE, *(_NETWORK[:2] if config.num_mem_kv else ())):
            if name not in self.given:
                continue
            given, true = self.given[name], actual[name]
            if isinstance(true, list):
                given = [given] * len(true) if isinstance(given, (int, bool)) else given
                given = [float(g) for g in given] if _numbers(given) else given
                true = [float(g) for g in true]
            if given != true:
                raise CheckpointError(
                    f"override {name}={self.given[name]!r} does not fit {self.found.weights}, which has "
                    f"{actual[name]!r}"
                )

    # --- the diffusion ---

    def schedule(self, config: LucidrainsConfig) -> Schedule:
        objective = self._objective(config)
        values: dict[str, Any] = {
            "variance_type": "learned_range" if config.learned_variance else "fixed_small",
            "clip_sample": True,
            "timestep_spacing": TRUNCATED,
            "use_clipped_model_output": self._rederives(objective),
            "prediction_type": OBJECTIVES[objective],
        }
        if "betas" in self.parts.buffers:
            values |= self._stored_betas()
        else:
            values |= self._stated_betas()
        try:
            return Schedule(**values)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise CheckpointError(f"the schedule of {self.found.source} is not usable: {first_line(error)}") from None

    def _stored_betas(self) -> dict[str, Any]:
        betas = self.parts.buffers["betas"].double()
        steps = len(betas)
        if not 1 <= steps <= MAX_TIMESTEPS:
            raise CheckpointError(f"{self.found.weights}: betas of {steps} timesteps; 1 to {MAX_TIMESTEPS:,} are read")
        names = [name for name in SCHEDULES if torch.allclose(named_betas(name, steps), betas, rtol=3e-6, atol=1e-9)]
        told = names[0] if names else "none of the package's own, as stored"
        self.notes.append(f"inferred from the buffers: timesteps={steps}, beta_schedule={told}")
        for name, actual in (("timesteps", [steps]), ("beta_schedule", names)):
            if name in self.given and self.given[name] not in actual:
                raise CheckpointError(
                    f"override {name}={self.given[name]!r} does not fit {self.found.weights}, whose betas are of "
                    f"timesteps={steps}, beta_schedule={told}"
                )
        exact = named_betas(names[0], steps) if names else betas_of(self.parts.buffers)
        return {"num_train_timesteps": steps, "trained_betas": tuple(exact.tolist())}

    def _stated_betas(self) -> dict[str, Any]:
        steps, name = self._stated("timesteps"), self._stated("beta_schedule")
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_TIMESTEPS:
            raise CheckpointError(f"override timesteps must be in 1..{MAX_TIMESTEPS:,}; got {steps!r}")
        if not isinstance(name, str) or name not in SCHEDULES:
            raise CheckpointError(f"beta_schedule must be one of {', '.join(SCHEDULES)}; got {name!r}")
        return {"num_train_timesteps": steps, "trained_betas": tuple(named_betas(name, steps).tolist())}

    def _stated(self, name: str) -> Any:
        """An argument of GaussianDiffusion that this file does not tell."""
        if name in self.given:
            return self.given[name]
        if self.shown["learned_sinusoidal_dim"] is not None and "betas" not in self.parts.buffers:
            raise CheckpointError(
                f"{self.found.weights} is a lucidrains U-Net alone, of a learned or random sinusoidal time embedding: "
                "ElucidatedDiffusion and the continuous-time classes of the package need one, and its "
                "GaussianDiffusion takes none; those are no DDPMs, so draw from it with its own class. If it was "
                "trained as a DDPM all the same, give objective, timesteps and beta_schedule "
                f"({', '.join(SCHEDULES)}) as overrides (--set NAME=VALUE)"
            )
        if name in self.defaults:
            self.assumed[name] = self.defaults[name]
            return self.defaults[name]
        has = "betas" in self.parts.buffers
        what = "its buffers do not tell the objective" if has else "it has no buffers of a GaussianDiffusion"
        wanted = ["objective (pred_noise, pred_x0 or pred_v)"] + (
            [] if has else [f"timesteps and beta_schedule ({', '.join(SCHEDULES)})"]
        )
        raise CheckpointError(
            f"{self.found.weights} is a lucidrains checkpoint, and {what}: give {' and '.join(wanted)} "
            f"as overrides (--set NAME=VALUE), or for the defaults of a version of {PACKAGE} name it "
            "(--weights-preset 2.0.0)"
        )

    def _objective(self, config: LucidrainsConfig) -> str:
        told = objective_of(self.parts.buffers)
        if config.learned_variance:
            given = self.given.get("objective", "pred_noise")
            if given != "pred_noise":
                raise CheckpointError(f"a LearnedGaussianDiffusion samples with objective=pred_noise; got {given!r}")
            self.notes.append("twice the channels: a LearnedGaussianDiffusion, so objective=pred_noise, learned range")
            return "pred_noise"
        if told is not None and "objective" not in self.given:
            self.notes.append(f"inferred from loss_weight: objective={told}")
            return told
        objective = self._stated("objective")
        if not isinstance(objective, str) or objective not in OBJECTIVES:
            raise CheckpointError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}")
        if told not in (None, objective):
            self.notes.append(f"overridden against the buffers, whose loss_weight is that of {told}")
        return objective

    def _rederives(self, objective: str) -> bool:
        """Whether their DDIM takes the noise from the clipped x_0; early versions took the network's own."""
        rederive = self._flag("rederive_pred_noise")
        if objective != "pred_noise":  # then it is always the noise that fits x_0
            return True
        if rederive is None and self.parts.nested:
            self.notes.append("assumed, for DDIM: rederive_pred_noise=True; early versions did not, override it then")
        return rederive is not False

    def _flag(self, name: str) -> bool | None:
        value = self.given.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"override {name} must be true or false; got {value!r}")
        return value

    def say(self, config: LucidrainsConfig) -> None:
        """What was inferred, assumed and overridden, and what nothing told."""
        notes, given = self.notes, self.given
        names = [*_ARCHITECTURE, "block_norm", "downsample", "num_mem_kv"]
        names += _NETWORK[:2] if config.num_mem_kv else ()
        values = config.to_dict()
        notes.append("inferred from the shapes: " + _text({name: values[name] for name in names}))
        if self.assumed:
            why = f"as by the defaults of {PACKAGE}" + (f" {self.version}" if self.defaults else "")
            notes.append(f"assumed, {why}: {_text(self.assumed)}")
        if given:
            notes.append("overridden: " + _text(given))
        ignored = [name for name in given if name in _WITHOUT_EFFECT]
        if ignored:
            notes.append(f"of no effect on sampling: {', '.join(ignored)}")
        if config.image_size is None:
            notes.append("could not be known: image_size; give it as an override, or image_shape to the sampler")
        self._say_normalize()
        steps = given.get("sampling_timesteps")
        if steps is not None:
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
                raise CheckpointError(f"override sampling_timesteps must be a positive whole number; got {steps!r}")
            eta = given.get("ddim_sampling_eta", 0.0)
            notes.append(f"fewer sampling_timesteps are DDIM there: method='ddim', steps={steps}, eta={eta} does as it")

    def _say_normalize(self) -> None:
        normalize = self._flag("auto_normalize")
        if normalize is None:
            self.notes.append("assumed: auto_normalize=True, so that images are (x + 1) / 2")
        elif not normalize:
            self.notes.append(
                "auto_normalize=False: x itself is the data; pictures made of it show -1 as black and 1 as white"
            )


def _numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={list(v) if isinstance(v, tuple) else v!r}" for name, v in values.items())
