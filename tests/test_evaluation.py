"""Distances of sample sets, against closed forms and plain loops; streams that read no more than a batch."""

from __future__ import annotations

import json
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from ddpm_fast import cli, evaluation
from ddpm_fast.data.image_files import DataError
from ddpm_fast.evaluation import Statistics, statistics
from ddpm_fast.evaluation.features import Extractor, extractor
from ddpm_fast.evaluation.image_stream import ImageStream, open_stream, rebatched
from ddpm_fast.evaluation.two_sample import compare_pair, pair_terms, swap_test

F = 6


def fake_extractor() -> Extractor:
    """Fixed random projections of the pixels."""
    weight = torch.randn(3 * 8 * 8, F, generator=torch.Generator().manual_seed(5)) / 192**0.5
    run = lambda x: ((x.float() - 120) / 40).flatten(1) @ weight  # noqa: E731
    return Extractor("projections", "FD-test", F, torch.device("cpu"), run)


def pictures(n: int, seed: int, mean: float = 120) -> np.ndarray:
    pixels = np.random.default_rng(seed).normal(mean, 40, (n, 8, 8, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def stream_of(images: np.ndarray, facts: dict | None = None) -> ImageStream:
    parts = lambda size: (images[i : i + size] for i in range(0, len(images), size))  # noqa: E731
    return ImageStream(len(images), "memory", "", parts, facts)


def gaussian(mean: list[float], covariance: np.ndarray, extractor: str | None = "projections") -> Statistics:
    return Statistics(torch.tensor(mean).double(), torch.from_numpy(covariance).double(), None, None, extractor)


def closed_form(mu: np.ndarray, s: np.ndarray, nu: np.ndarray, r: np.ndarray) -> float:
    """Dowson and Landau 1982, with the square root by eigenvectors of symmetric matrices alone."""
    values, vectors = np.linalg.eigh(s)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ r @ root).clip(0)).sum()
    return float(((mu - nu) ** 2).sum() + np.trace(s) + np.trace(r) - 2 * cross)


def test_frechet_distance_is_the_closed_form():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, F)) @ random.normal(size=(F, F))
    a = random.normal(size=(F, F))
    other = a @ a.T
    found = evaluation.frechet_distance(torch.from_numpy(x).float(), gaussian([1.0] * F, other))
    x = x.astype(np.float32).astype(np.float64)
    assert found == pytest.approx(closed_form(x.mean(0), np.cov(x.T), np.ones(F), other), rel=1e-6)


def test_statistics_of_a_stream_are_numpys():
    images = pictures(257, 0)
    network = fake_extractor()
    features = evaluation.features_of(stream_of(images), network, 50)
    made = statistics(features.split(50), 257, "projections")
    x = features.double().numpy()
    np.testing.assert_allclose(made.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.covariance, np.cov(x.T), rtol=1e-9)
    assert made.features is not None and torch.equal(made.features, features)
    with pytest.raises(DataError, match="257"):
        statistics(features[:200].split(50), 257, "projections")


def test_kept_features_are_spread_over_the_set(monkeypatch):
    monkeypatch.setattr("ddpm_fast.evaluation.distances.KEPT", 10)
    made = statistics(torch.arange(100.0)[:, None].split(7), 100, "x")
    assert made.features is not None
    assert made.features[:, 0].tolist() == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


def test_kid_of_all_images_is_the_unbiased_mmd():
    """With subsets as large as the sets the mean over subsets is the squared MMD itself."""
    x, y = torch.randn(40, F), torch.randn(40, F) + 0.5
    k = lambda a, b: float((a.double() @ b.double() / F + 1) ** 3)  # noqa: E731
    same = sum(k(s[i], s[j]) for s in (x, y) for i in range(40) for j in range(40) if i != j) / (40 * 39)
    cross = sum(k(a, b) for a in x for b in y) / 40**2
    found = evaluation.kernel_distance(x, y)
    assert found is not None
    assert found[0] == pytest.approx(same - 2 * cross, rel=1e-4)


def test_the_extrapolation_takes_the_bias_of_few_samples_away():
    """Samples of the reference's own Gaussian: the true distance is 0, what is measured is bias."""
    random = torch.Generator().manual_seed(1)
    against = gaussian([0.0] * F, np.eye(F))
    measured, extrapolated = [], []
    for _ in range(20):
        x = torch.randn(600, F, generator=random, dtype=torch.float64)
        measured.append(evaluation.frechet_distance(x, against))
        extrapolated.append(evaluation.extrapolate(x, against, measured[-1]))
    assert np.mean(measured) > 0.01
    assert abs(np.mean(extrapolated)) < 0.25 * np.mean(measured)


def test_evaluation_says_what_it_is_worth(tmp_path):
    network = fake_extractor()
    against = evaluation.reference(stream_of(pictures(600, 1)), network, cache=tmp_path)
    alike = evaluation.evaluate(stream_of(pictures(600, 2)), against, network)
    other = evaluation.evaluate(stream_of(pictures(600, 2, mean=150)), against, network)
    assert alike.distance < 0.1 * other.distance
    assert alike.kid is not None and other.kid is not None and abs(alike.kid) < 0.1 * other.kid
    assert alike.distance_name == "FD-test" and "biased" in alike.notes[0]
    few = evaluation.evaluate(stream_of(pictures(5, 2)), against, network)
    assert few.extrapolated is None and any("singular" in note for note in few.notes)
    with pytest.raises(ValueError, match="one extractor"):
        evaluation.evaluate(stream_of(pictures(9, 2)), gaussian([0.0] * F, np.eye(F), "inception"), network)


def test_the_reference_is_made_once(tmp_path):
    images = pictures(30, 3)
    calls = []

    def batches(size: int):
        calls.append(size)
        yield images

    stream = ImageStream(30, "memory", "stamp", batches)
    first = evaluation.reference(stream, fake_extractor(), cache=tmp_path)
    again = evaluation.reference(stream, fake_extractor(), cache=tmp_path)
    assert calls == [64] and torch.equal(first.covariance, again.covariance) and again.count == 30
    (stored,) = tmp_path.iterdir()
    stored.write_bytes(stored.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="made anew"):
        anew = evaluation.reference(stream, fake_extractor(), cache=tmp_path)
    assert len(calls) == 2 and torch.equal(first.covariance, anew.covariance)


def test_statistics_of_other_tools(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(F), sigma=np.eye(F))
    known = evaluation.load_statistics(tmp_path / "theirs.npz")
    result = evaluation.evaluate(stream_of(pictures(50, 0)), known, fake_extractor())
    assert result.kid is None and result.against_count is None and any("no KID" in note for note in result.notes)
    assert evaluation.is_statistics(tmp_path / "theirs.npz")
    np.savez(tmp_path / "broken.npz", mu=np.zeros(F), sigma=np.eye(F + 1))
    with pytest.raises(DataError, match="sigma"):
        evaluation.load_statistics(tmp_path / "broken.npz")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "packed.npz"])
def test_streams_hold_no_more_than_a_batch(tmp_path, name):
    images = np.random.default_rng(0).integers(0, 256, (3000, 32, 32, 3), dtype=np.uint8)  # 9.2 MB
    path = tmp_path / name
    {"a.npy": np.save, "a.npz": np.savez, "packed.npz": np.savez_compressed}[name](path, images)
    stream = open_stream(path)
    assert stream.count == 3000
    tracemalloc.start()
    position = 0
    for batch in stream.batches(64):
        assert np.array_equal(batch, images[position : position + 64])
        position += len(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert position == 3000 and peak < 2e6


def test_streams_of_damaged_files(tmp_path):
    images = pictures(100, 0)
    np.savez(tmp_path / "a.npz", images)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        list(open_stream(tmp_path / "flipped.npz").batches(64))
    for name, array, message in (
        ("floats.npy", images.astype(np.float32), "uint8"),
        ("flat.npy", images.reshape(-1), "must be"),
        ("none.npy", images[:0], "n > 0"),
    ):
        np.save(tmp_path / name, array)
        with pytest.raises(DataError, match=message):
            open_stream(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="sample store"):
        open_stream(tmp_path / "absent")


def test_rebatching_keeps_the_order():
    values = np.arange(23)[:, None]
    parts = [values[:4], values[4:4], values[4:15], values[15:]]
    batches = list(rebatched(parts, 5))
    assert [len(b) for b in batches] == [5, 5, 5, 5, 3] and np.array_equal(np.concatenate(batches), values)


def test_pair_terms_sum_to_the_unbiased_mmd():
    a, b = torch.randn(12, F), torch.randn(12, F)
    k = lambda x, y: float((x.double() @ y.double() / F + 1) ** 3)  # noqa: E731
    expected = sum(
        k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(b[i], a[j]) for i in range(12) for j in range(12) if i != j
    )
    assert float(pair_terms(a, b).sum()) == pytest.approx(expected, rel=1e-9)


def test_p_values_of_sets_alike_are_uniform_and_never_below_their_level():
    random = torch.Generator().manual_seed(0)
    values = []
    for seed in range(200):
        a, b = (torch.randn(25, F, generator=random) for _ in range(2))
        values.append(swap_test(pair_terms(a, b), seed, swaps=199)[2])
    assert 0.01 <= np.mean(np.array(values) <= 0.05) <= 0.10  # 0.05 +- 3 deviations
    assert 0.4 <= np.mean(values) <= 0.6


def test_a_pair_is_told_apart_only_where_it_differs():
    images = pictures(200, 4)
    rounding = images.copy()
    rounding[::7, 3, 3, 0] ^= 1  # a grey level in a pixel of some images, as another dtype would give
    manifest = {"seed": 0, "first_id": 0, "model": "m"}
    report = compare_pair(stream_of(images, manifest), stream_of(rounding, manifest), fake_extractor())
    assert not report.distinguishable and report.same_noise and report.identical == 200 - 29
    assert report.pixel_error == pytest.approx(29 / images.size)
    assert report.psnr == pytest.approx(10 * np.log10(255**2 / (29 / images.size)))
    brighter = np.clip(images.astype(int) + 1, 0, 255).astype(np.uint8)
    report = compare_pair(stream_of(images), stream_of(brighter), fake_extractor())
    assert report.distinguishable and report.kid > report.threshold and report.same_noise is None
    assert not report.distinguishable_as_sets, "a grey level is less than the images differ among themselves"
    lighter = compare_pair(stream_of(images), stream_of(pictures(200, 4, mean=150)), fake_extractor())
    assert lighter.distinguishable_as_sets and lighter.unpaired_kid > lighter.unpaired_threshold
    same = compare_pair(stream_of(images), stream_of(images), fake_extractor())
    assert same.p_value == 1 and same.identical == 200 and same.psnr is None and same.kid == 0


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The offline extractor, on pictures of which one set is noisier."""
    np.savez(tmp_path / "a.npz", pictures(24, 0))
    np.savez(tmp_path / "b.npz", pictures(24, 1, mean=160))
    log = tmp_path / "log.jsonl"

    def run(*words: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddpm-fast", "evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return (stopped.value.code, *capsys.readouterr())

    code, out, _ = run(
        tmp_path / "a.npz", "--against", tmp_path / "b.npz", "--cache", tmp_path, "--json", "--log", log, "--note", "7"
    )
    facts = json.loads(out)
    assert code in (0, None) and facts["distance_name"] == "FD-EffLite0" and facts["count"] == 24
    assert json.loads(log.read_text()) == facts and facts["note"] == "7"
    network = extractor("efficientnet-lite0")
    features = [
        network(torch.from_numpy(pictures(24, seed, mean)).permute(0, 3, 1, 2)).double().numpy()
        for seed, mean in ((0, 120), (1, 160))
    ]
    (mu, s), (nu, r) = ((x.mean(0), np.cov(x.T)) for x in features)
    assert facts["distance"] == pytest.approx(closed_form(mu, s, nu, r), rel=1e-3)
    code, out, _ = run("--pair", tmp_path / "a.npz", tmp_path / "b.npz")
    assert code in (0, None) and "can be told apart: 24 pairs" in out
    for words, message in (
        ((), "SAMPLES"),
        ((tmp_path / "a.npz",), "--against"),
        ((tmp_path / "a.npz", "--against", tmp_path / "b.npz", "--features", "vgg"), "efficientnet-lite0"),
        ((tmp_path / "none.npz", "--against", tmp_path / "b.npz"), "no images"),
    ):
        code, out, err = run(*words)
        assert code == 2 and message in err and err.count("\n") == 1
