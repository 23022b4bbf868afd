"""Every published adapter: what it leaves alone, what it keeps, and which models it takes."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

import pytest
import torch
from torch import nn

import gradkit as gk
from gradkit.testing import bits as plain
from tta.references import images, network

# What an adapter takes beyond the model, so that it does something with a small network.
ADAPTERS = {
    "NoAdapt": {},
    "PTBN": {},
    "TENT": {"lr": 1e-2},
    "GraTa": {"lr": 1e-2},
    "DUA": {},
    "MedBN": {},
    "SAR": {"lr": 1e-2, "entropy_threshold": 0.66, "reset_threshold": 0.0},
    "EATA": {"lr": 1e-2, "entropy_threshold": 0.66, "similarity": 0.99},
    "MEMO": {"lr": 1e-2},
    "CoTTA": {},
    "DIGA": {"confidence": 0.5},
    "DomainAdaptor": {},
    "InTEnt": {},
    "DLTTA": {"preset": gk.tta.DLTTAPreset(2, 1, True, 4.0, False, True, False, 1e-2)},
    "DeYO": {"lr": 1e-2, "entropy_share": 1.0, "difference": 0.0},
    "DeTTA": {},
    "Fuse": {},
    "PASS": {"hidden": 4, "prompted": "1", "image_size": (12, 16)},
    "RoTTA": {"lr": 1e-2, "memory": 2, "every": 2},
    "DistilledFuse": {},
    "VPTTA": {"prompt_size": 3, "memory": 2, "neighbours": 1},
}
KEEPS_NOTHING = {"NoAdapt", "PTBN", "MedBN", "MEMO", "DomainAdaptor", "InTEnt", "Fuse"}
MOVES_ON = {"VPTTA"}  # it counts images, skipped ones included
DRAWS = {"GraTa", "DeYO", "DeTTA", "RoTTA", "DistilledFuse"}  # in the objective, before a step
# What an adapter cannot do without.


def mean_of_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(images).mean() + images


NEEDED = {"DeTTA": {"denoise": mean_of_logits}}


def make(name: str, model: nn.Module | None = None, **options) -> gk.tta.Adapter:
    adapter = getattr(gk.tta, name)
    options = {**NEEDED.get(name, {}), **ADAPTERS[name], **options}
    return adapter(network() if model is None else model, **options)


def layers_of(adapter: gk.tta.Adapter) -> nn.Sequential:
    """The layers of the adapted network."""
    model = adapter.model
    wrappers = (gk.tta.vptta.Prompted, gk.tta.pass_tta.Decorated)
    return model.model if isinstance(model, wrappers) else model


def make_by_default(name: str, model: nn.Module, **options) -> gk.tta.Adapter:
    return getattr(gk.tta, name)(model, **NEEDED.get(name, {}), **options)


def test_the_table_has_every_adapter() -> None:
    made = [
        name
        for name in gk.tta.__all__
        if getattr(getattr(gk.tta, name), "__annotations__", {}).get("return") == "Adapter"
    ]
    assert set(made) == set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_made_from_a_model_alone(name: str) -> None:
    """With its published defaults."""
    x = images(1)[0]
    logits = make_by_default(name, network())(x)
    assert logits.shape == (1, 2, 12, 16)
    assert not logits.requires_grad
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_source_model_and_the_images_are_never_changed(name: str) -> None:
    model, stream = network(), images(2)
    model.train()
    model[0].weight.requires_grad_(False)
    before, given, random = plain(model.state_dict()), plain(stream), torch.get_rng_state()
    adapter = make(name, model)
    for x in stream:
        adapter(x)
    assert plain(model.state_dict()) == before
    assert plain(stream) == given
    assert model.training
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ADAPTERS)
def test_reset_and_loading_are_bit_exact(name: str) -> None:
    stream, adapter = images(4), make(name)
    start = plain(adapter.state_dict())
    first = [adapter(x) for x in stream[:2]]
    if name not in KEEPS_NOTHING:
        assert plain(adapter.state_dict()) != start
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    middle, twin = plain(adapter.state_dict()), copy.deepcopy(adapter)
    rest = [adapter(x) for x in stream[2:]]

    file.seek(0)
    fresh = make(name)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert plain(fresh.state_dict()) == middle
    assert plain([fresh(x) for x in stream[2:]]) == plain(rest)
    assert plain([twin(x) for x in stream[2:]]) == plain(rest)
    assert plain(twin.state_dict()) == plain(adapter.state_dict())

    adapter.reset()
    assert plain(adapter.state_dict()) == start
    assert adapter.last_step is None
    assert plain([adapter(x) for x in stream[:2]]) == plain(first)


@pytest.mark.parametrize("name", ADAPTERS)
def test_pickled_adapters_go_on_alike(name: str) -> None:
    stream, adapter = images(2), make(name)
    adapter(stream[0])
    twin = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(adapter(stream[1]), twin(stream[1]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_episodic_starts_anew_for_each_batch(name: str) -> None:
    stream, adapter = images(2), make(name, episodic=True)
    assert plain([adapter(x) for x in stream]) == plain([make(name)(x) for x in stream])


def held_by(adapter: gk.tta.Adapter) -> tuple[int, int]:
    """The number of the tensors that an adapter reaches, and their bytes."""
    seen: dict[int, object] = {}
    found: list[torch.Tensor] = []
    todo: list[object] = [adapter]
    ends = (type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float)
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, ends):
            continue
        seen[id(each)] = each  # which keeps the id in use
        if isinstance(each, torch.Tensor):
            found.append(each)
            todo += [each.grad, each.grad_fn, vars(each)]
        else:
            todo += gc.get_referents(each)
    return len(found), sum(each.numel() * each.element_size() for each in found)


LENGTH = 30 + 470 * bool(os.environ.get("GRADKIT_LONG_STREAM"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_long_stream_takes_no_more_memory(name: str) -> None:
    """All memories of the adapters in the table are full after two images, of presets after one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)).eval()
    adapter, held, sizes = make(name, model), set(), []
    for count in range(LENGTH):
        adapter(torch.rand(1, 3, 8, 8))
        if count % 10 == 9:
            held.add(held_by(adapter))
            file = io.BytesIO()
            torch.save(adapter.state_dict(), file)
            sizes.append(len(file.getvalue()))
    # An image that was learnt from may hold a few tensors more than one that was not.
    counts, numbers = zip(*held, strict=True)
    assert max(counts) - min(counts) < 5
    assert max(numbers) - min(numbers) < 1024
    assert max(sizes) - min(sizes) < 256  # but for the lengths of numbers


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_image_that_is_not_finite_harms_no_later_one(name: str) -> None:
    stream, adapter, twin = images(5), make(name), make(name)
    if adapter.optimizer is not None:
        adapter, twin = make(name, nonfinite="skip"), make(name, nonfinite="skip")
    for x in stream[:3]:
        assert torch.equal(adapter(x), twin(x))
    broken = stream[3].clone()
    broken[0, 0, 5, 5] = torch.nan
    assert not torch.isfinite(adapter(broken)).all()
    logits = adapter(stream[4])
    assert torch.isfinite(logits).all()
    if name not in MOVES_ON:
        assert torch.equal(logits, twin(stream[4]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_batch_without_images_is_an_error_that_changes_nothing(name: str) -> None:
    adapter = make(name, network(torch.float64))
    adapter(images(1)[0])
    before = plain(adapter.state_dict())
    with pytest.raises(ValueError, match=r"shape \[0, 3, 12, 16\]: there are none to adapt to"):
        adapter(images(1)[0][:0])
    assert plain(adapter.state_dict()) == before


def test_the_table_has_every_adapter_that_draws_before_a_step() -> None:
    made = {name: make(name).objectives.values() for name in ADAPTERS}
    assert {
        name for name, parts in made.items() if any(hasattr(part, "generator") for part in parts)
    } == DRAWS


@pytest.mark.parametrize("applied", [0, 1])
@pytest.mark.parametrize("name", sorted(DRAWS))
def test_a_step_that_finds_nothing_to_learn_from_puts_back_its_draws(
    name: str, applied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own draws only, not those of a step before it that was applied."""
    options = {"on_empty": "skip", **({"every": 1} if name == "RoTTA" else {})}
    x, random = images(1)[0], torch.get_rng_state()

    def drawing(adapter: gk.tta.Adapter) -> tuple[object, torch.Generator]:
        (part,) = (each for each in adapter.objectives.values() if hasattr(each, "generator"))
        return part, part.generator

    twin = make(name, **options)
    if applied:
        twin(x)
        assert twin.last_step.applied
    adapter = make(name, steps=applied + 1, **options)
    part, generator = drawing(adapter)
    evaluate, drawn = type(part).__call__, []

    def abstaining(self, *inputs):
        loss = evaluate(self, *inputs)
        drawn.append(generator.get_state())
        return loss if len(drawn) <= applied else None

    monkeypatch.setattr(type(part), "__call__", abstaining)
    adapter(x)
    assert not adapter.last_step.applied
    assert len(drawn) == applied + 1
    expected = drawing(twin)[1].get_state()
    assert torch.equal(generator.get_state(), expected)
    assert not torch.equal(drawn[-1], expected)  # it did draw
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_that_raises_leaves_no_trace(name: str) -> None:
    adapter = make(name)
    adapter(images(1)[0])
    before, last = plain(adapter.state_dict()), adapter.last_step
    random = torch.get_rng_state()
    handle = layers_of(adapter)[7].register_forward_pre_hook(lambda *_: torch.rand(1) / 0 + 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(images(2)[1])
    handle.remove()
    assert plain(adapter.state_dict()) == before
    assert adapter.last_step is last
    assert adapter.optimizer is None or torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ADAPTERS)
def test_classifiers(name: str) -> None:
    count = 1 if name == "VPTTA" else 4  # a prompt is one image's
    torch.manual_seed(0)
    classifier = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    logits = make_by_default(name, classifier)(torch.rand(count, 3, 8, 8))
    assert logits.shape == (count, 5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in ("VPTTA", "PASS")])
def test_volumes_and_a_softmax_over_classes(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 1))
    options = {"probabilities": "softmax"} if "probabilities" in accepted(name) else {}
    if name == "DeTTA":
        options["noise"] = "gaussian"  # blind spots are for images of two dimensions
    if name == "DomainAdaptor":
        options["classes"] = lambda logits: logits
    if name == "GraTa":  # its strong augmentation is for images of two dimensions
        options["pseudo"] = gk.tta.softmax_entropy
    if name == "RoTTA":
        options["augmentation"] = lambda images, generator: images
    if name == "DistilledFuse":  # the same
        options["augmentation"] = lambda images, generator: images
        options["fusion"] = gk.tta.Fusion(probabilities="softmax")
    logits = make_by_default(name, model, **options)(torch.rand(1, 1, 4, 4, 4))
    assert logits.shape == (1, 3, 4, 4, 4)
    assert torch.isfinite(logits).all()


def accepted(name: str) -> set[str]:
    return set(getattr(gk.tta, name).__annotations__)


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_tells_what_the_documentation_says(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "test-time-adaptation.md").read_text()
    table = page.partition("| method | `adapter.facts` |")[2].partition("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    told = set(rows[0][2].strip().replace("`", "").split(", ")) if rows else set()
    adapter = make(name)
    assert adapter.facts == ({"shares": {}} if name == "DomainAdaptor" else {})
    for x in images(2):
        adapter(x)
        assert set(adapter.facts) == told
        assert (adapter.last_step is None) == (adapter.optimizer is None)


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_costs_what_the_documentation_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "test-time-adaptation.md"
    lines = page.read_text().partition("| method | `adapter.facts` |")[0].splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
    adapter, count = make(name), {"forward": 0, "backward": 0}
    forward = nn.Conv2d.forward

    def counted(self, x):
        count["forward"] += self.out_channels == 2  # the last layer, also of a teacher
        return forward(self, x)

    def went_back(*_):
        count["backward"] += 1

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    layers_of(adapter)[4].register_full_backward_hook(went_back)
    adapter(images(1)[0])
    assert row.split("|")[4].strip() == f"{count['forward']}, {count['backward']}"
