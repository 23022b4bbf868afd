"""The balanced memory beside a plain simulation."""

from __future__ import annotations

import math

import pytest
import torch

from gradkit.tta.balanced_memory import BalancedMemory


def simulated(stream, size: int, classes: int) -> list[list[tuple[int, int]]]:
    """For each class the numbers of the images that are kept, with their ages."""
    kept: list[list[dict]] = [[] for _ in range(classes)]
    for number, (label, uncertainty) in enumerate(stream):
        full = sum(len(of) for of in kept) >= size
        room = len(kept[label]) < size / classes
        if room and not full:
            taken = True
        else:
            most = max(len(of) for of in kept)
            among = [i for i in range(classes) if len(kept[i]) == most] if room else [label]
            worst = None
            for i in among:
                for item in kept[i]:
                    score = 1 / (1 + math.exp(-item["age"] / size)) + item["uncertainty"]
                    if worst is None or score >= worst[0]:
                        worst = (score, i, item)
            taken = worst[0] > 0.5 + uncertainty
            if taken:
                kept[worst[1]].remove(worst[2])
        if taken:
            kept[label].append({"number": number, "uncertainty": uncertainty, "age": 0})
        for of in kept:
            for item in of:
                item["age"] += 1
    return [[(item["number"], item["age"]) for item in of] for of in kept]


@pytest.mark.parametrize(("size", "classes"), [(6, 1), (6, 3), (7, 3), (2, 4), (1, 1)])
def test_it_equals_a_simulation(size: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(size + classes)
    labels = torch.rand(60, generator=generator).square() * classes  # the first class is frequent
    stream = list(
        zip(labels.int().tolist(), torch.rand(60, generator=generator).tolist(), strict=True)
    )
    memory = BalancedMemory(size, classes)
    for count, (label, uncertainty) in enumerate(stream):
        memory.offer(torch.tensor(float(count)), label, uncertainty)
        expected = [item for of in simulated(stream[: count + 1], size, classes) for item in of]
        assert memory.images().tolist() == [number for number, _ in expected]
        ages = torch.tensor([float(age) for _, age in expected]) / size
        assert torch.equal(memory.ages(), ages)
        assert len(memory) <= size
    assert len(memory) == size


def test_a_rare_class_is_kept() -> None:
    memory = BalancedMemory(4, 2)
    for count in range(20):
        memory.offer(torch.tensor(float(count)), int(count == 3), 0.5)
    assert 3 in memory.images().tolist()
    alone = BalancedMemory(4)
    for count in range(20):
        alone.offer(torch.tensor(float(count)), 0, 0.5)
    assert alone.images().tolist() == [16, 17, 18, 19]  # alike but for their ages


def test_an_uncertain_image_is_not_taken() -> None:
    memory = BalancedMemory(1)
    memory.offer(torch.tensor(0.0), 0, 0.0)
    memory.offer(torch.tensor(1.0), 0, 0.9)
    assert memory.images().tolist() == [0]
    for _ in range(9):  # ages do not make up for 0.9
        memory.offer(torch.tensor(1.0), 0, 0.9)
    assert memory.images().tolist() == [0]
    memory.offer(torch.tensor(2.0), 0, 0.4)
    assert memory.images().tolist() == [2]


def test_its_state_goes_on_alike() -> None:
    first, second = BalancedMemory(3, 2), BalancedMemory(3, 2)
    for count in range(5):
        first.offer(torch.tensor(float(count)), count % 2, 0.1 * count)
    second.load_state_dict(first.state_dict())
    for memory in (first, second):
        memory.offer(torch.tensor(5.0), 0, 0.0)
    assert torch.equal(first.images(), second.images())
    assert torch.equal(first.ages(), second.ages())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="size is 0"):
        BalancedMemory(0)
    with pytest.raises(ValueError, match="classes is 0"):
        BalancedMemory(3, 0)
