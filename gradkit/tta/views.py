"""Weak views: flips and quarter turns of an image, each with its inverse.

A prediction on a view is mapped back by the view's inverse, so that predictions on several views
can be compared or averaged per pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Shaped
from torch import Tensor

Image = Shaped[Tensor, "*leading height width"]


def identity(image: Image) -> Image:
    """The image itself.

    Examples:
        >>> identity(torch.tensor([[1, 2]]))
        tensor([[1, 2]])
    """
    return image


def flip_horizontal(image: Image) -> Image:
    """Left and right exchanged; its own inverse.

    Examples:
        >>> flip_horizontal(torch.tensor([[1, 2], [3, 4]]))
        tensor([[2, 1],
                [4, 3]])
    """
    return image.flip(-1)


def flip_vertical(image: Image) -> Image:
    """Top and bottom exchanged; its own inverse.

    Examples:
        >>> flip_vertical(torch.tensor([[1, 2], [3, 4]]))
        tensor([[3, 4],
                [1, 2]])
    """
    return image.flip(-2)


def rotate(image: Image, quarter_turns: int) -> Shaped[Tensor, "*leading rows columns"]:
    """The image turned counter-clockwise by `quarter_turns` times 90°; negative turns clockwise.

    An odd number of turns makes [..., H, W] into [..., W, H].

    Examples:
        >>> rotate(torch.tensor([[1, 2, 3]]), 1)
        tensor([[3],
                [2],
                [1]])
    """
    return torch.rot90(image, quarter_turns, (-2, -1))


@dataclass(frozen=True)
class View:
    """An invertible transformation of an image [..., H, W] and of anything aligned with it.

    To be picklable, `forward` and `inverse` must be module-level functions or `functools.partial`
    of such functions.

    Attributes:
        name: The name, for messages.
        forward: The transformation.
        inverse: Its inverse.

    Examples:
        >>> mirror = View("mirror", flip_horizontal, flip_horizontal)
        >>> mirror.inverse(mirror.forward(torch.tensor([[1, 2, 3]])))
        tensor([[1, 2, 3]])
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


WEAK_VIEWS: tuple[View, ...] = (
    View("identity", identity, identity),
    View("flip_horizontal", flip_horizontal, flip_horizontal),
    View("flip_vertical", flip_vertical, flip_vertical),
    View("rotate_90", partial(rotate, quarter_turns=1), partial(rotate, quarter_turns=-1)),
    View("rotate_180", partial(rotate, quarter_turns=2), partial(rotate, quarter_turns=-2)),
    View("rotate_270", partial(rotate, quarter_turns=3), partial(rotate, quarter_turns=-3)),
)
"""The six weak augmentations of GraTa (https://arxiv.org/abs/2408.07343), in its order."""


def check_views(views: Sequence[View], image: Tensor) -> None:
    """Check that the built-in views can be applied to these images.

    They act on the last two axes, so images need two spatial axes: [N, channels, H, W] or
    [N, channels, D, H, W]. Sequences [N, channels, L] need other views.

    Raises:
        ValueError: If a view would transform the channel axis.

    Examples:
        >>> check_views(WEAK_VIEWS, torch.zeros(1, 3, 8, 8))
    """
    if image.dim() > 3:
        return
    for view in views:
        change = getattr(view.forward, "func", view.forward)
        if change in (flip_vertical, rotate):
            raise ValueError(
                f"the view {view.name!r} changes the last two axes, but images of shape "
                f"{list(image.shape)} have no two axes of positions: pass views of your own, "
                "Consistency(views=(View(name, forward, inverse), ...))."
            )
