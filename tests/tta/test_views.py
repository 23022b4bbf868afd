import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradkit.tta.views import WEAK_VIEWS, flip_horizontal, flip_vertical, identity, rotate

# What each view does to the pixel at (row, column) of an H × W image: where its value comes from.
SOURCE_PIXEL = {
    "identity": lambda r, c, h, w: (r, c),
    "flip_horizontal": lambda r, c, h, w: (r, w - 1 - c),
    "flip_vertical": lambda r, c, h, w: (h - 1 - r, c),
    "rotate_90": lambda r, c, h, w: (c, w - 1 - r),
    "rotate_180": lambda r, c, h, w: (h - 1 - r, w - 1 - c),
    "rotate_270": lambda r, c, h, w: (h - 1 - c, r),
}
by_name = pytest.mark.parametrize("view", WEAK_VIEWS, ids=lambda view: view.name)


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def test_there_are_six_different_views():
    assert [view.name for view in WEAK_VIEWS] == list(SOURCE_PIXEL)
    square = numbered(3, 3)
    results = {tuple(view.forward(square).flatten().tolist()) for view in WEAK_VIEWS}
    assert len(results) == 6


@by_name
@settings(deadline=None, max_examples=25)
@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_inverse_undoes_forward_and_forward_inverse(view, leading, height, width):
    image = numbered(*leading, height, width)
    assert torch.equal(view.inverse(view.forward(image)), image)
    assert torch.equal(view.forward(view.inverse(image)), image)


@by_name
def test_every_pixel_comes_from_where_it_should(view):
    image = numbered(2, 3, 4)
    seen = view.forward(image)
    turned = view.name in ("rotate_90", "rotate_270")
    assert seen.shape == ((2, 4, 3) if turned else (2, 3, 4))
    expected = np.empty(tuple(seen.shape), dtype=int)
    for r in range(seen.shape[1]):
        for c in range(seen.shape[2]):
            row, column = SOURCE_PIXEL[view.name](r, c, 3, 4)
            expected[:, r, c] = image[:, row, column].numpy()
    assert seen.tolist() == expected.tolist()


@by_name
def test_the_image_is_not_changed_and_gradients_pass(view):
    image = torch.arange(12.0).reshape(3, 4).requires_grad_()
    before = image.detach().clone()
    (view.forward(image) * view.forward(before)).sum().backward()
    assert torch.equal(image.detach(), before)
    assert torch.equal(image.grad, before)


def test_turns_add_up():
    image = numbered(2, 3, 4)
    assert torch.equal(rotate(rotate(image, 1), 1), rotate(image, 2))
    assert torch.equal(rotate(image, 4), identity(image))
    assert torch.equal(flip_horizontal(flip_vertical(image)), rotate(image, 2))


def test_views_can_be_pickled():
    image = numbered(2, 3)
    for view, twin in zip(WEAK_VIEWS, pickle.loads(pickle.dumps(WEAK_VIEWS)), strict=True):
        assert torch.equal(twin.forward(image), view.forward(image))
        assert torch.equal(twin.inverse(image), view.inverse(image))
