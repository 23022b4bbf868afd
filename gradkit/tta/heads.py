"""Losses of auxiliary heads that were trained on the source: how well one solves its task.

The tasks need no labels. Chen et al. ([GraTa](https://arxiv.org/abs/2408.07343)) compare them in
every pair of a pseudo and an auxiliary objective: `Reconstruction`, `Rotation`,
`SuperResolution`, and `Denoising` with Gaussian noise, beside consistency and entropy. Each takes
its head as a function of the model and images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gradkit.core.arguments import check_count, own_generator
from gradkit.tta.augment import range_outside
from gradkit.tta.objectives import Image, Scalar
from gradkit.tta.statistics import at_least_float32
from gradkit.tta.views import WEAK_VIEWS, View

Head = Callable[[Any, Tensor], Tensor]
"""From the model and images to the output of an auxiliary head."""

Images = Float[Tensor, "batch channels height width"]

ROTATION_VIEWS: tuple[View, ...] = (*WEAK_VIEWS[1:], WEAK_VIEWS[0])
"""The classes of GraTa's rotation task, in the order of its logits: flips, turns, none."""


def restoration_error(name: str, output: Any, image: Image) -> Image:
    """σ(output) − image, of a head that restores images, in float32 at least.

    Args:
        name: What the head is called, for messages.
        output: What it returned.
        image: What it was to return.

    Raises:
        ValueError: If the output is not of the image's shape.

    Examples:
        >>> restoration_error("denoise", torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5, 1.0]]]]))
        tensor([[[[ 0.0000, -0.5000]]]])
    """
    if not isinstance(output, Tensor) or output.shape != image.shape:
        raise ValueError(
            f"{name} returned {_described(output)} for images of shape {list(image.shape)}; it "
            "must return logits of the images, of their shape"
        )
    return torch.sigmoid(at_least_float32(output)) - image


def check_restorable(task: str, image: Tensor) -> None:
    """Check that these are floating-point images in [0, 1], as sigmoids are.

    Args:
        task: What they are for, for messages.
        image: The images.

    Raises:
        ValueError: If they are not.

    Examples:
        >>> check_restorable("reconstruction", torch.rand(1, 3, 8, 8))
    """
    if not image.is_floating_point():
        raise ValueError(f"{task} needs floating-point images in [0, 1], but got {image.dtype}")
    outside = range_outside(image)
    if outside is not None:
        low, high = outside
        raise ValueError(
            f"{task} compares images with sigmoids, in [0, 1], but these lie in [{low:.4g}, "
            f"{high:.4g}]: scale them to [0, 1], and make a normalisation by mean and standard "
            "deviation the model's first layer"
        )


class Reconstruction:
    """The error of a head that reproduces the image from the network's features.

        loss = mean of (σ(reconstruct(model, x)) − x)²

    The reconstruction objective of [GraTa](https://arxiv.org/abs/2408.07343) (Table 5). Cost: one
    forward pass. State: none.

    Args:
        reconstruct: `(model, images) -> logits` of the images [N, C, H, W] or of volumes, of their
            shape.

    Raises:
        ValueError: In a call, if the images are not in [0, 1], or the head's output has not their
            shape.

    Examples:
        >>> objective = Reconstruction(lambda model, images: torch.zeros_like(images))
        >>> objective(None, torch.ones(1, 3, 4, 4))  # (½ − 1)²
        tensor(0.2500)
    """

    def __init__(self, reconstruct: Head) -> None:
        self.reconstruct = reconstruct

    def check_images(self, image: Tensor) -> None:
        """Check that these are floating-point images in [0, 1].

        Raises:
            ValueError: If they are not.
        """
        check_restorable("reconstruction", image)

    def __call__(self, model: Any, image: Image) -> Scalar:
        """The loss."""
        self.check_images(image)
        output = self.reconstruct(model, image)
        return restoration_error("reconstruct", output, image).square().mean()


class SuperResolution:
    """The error of a head that enlarges the image.

        x̃ = x, made smaller by `factor` along each axis (bilinear, aligned corners)
        loss = mean of (σ(enlarge(model, x̃)) − x)²

    The super-resolution objective of [GraTa](https://arxiv.org/abs/2408.07343) (Table 5). The paper
    says that images are enlarged four times; its released code enlarges them by 2 along each axis,
    which is the default. Cost: one forward pass on the small image. State: none.

    Args:
        enlarge: `(model, small images) -> logits` of the images, of their full shape.
        factor: By how much images are made smaller.

    Raises:
        TypeError: If `factor` is no whole number.
        ValueError: If `factor` is less than 2; in a call, if the images are not [N, C, H, W] in
            [0, 1], if their height or width is not divisible by `factor`, or if the head's output
            has not their shape.

    Examples:
        >>> def enlarge(model, images):
        ...     return torch.logit(images.repeat_interleave(2, -2).repeat_interleave(2, -1))
        >>> SuperResolution(enlarge)(None, torch.full((1, 3, 8, 8), 0.25))
        tensor(0.)
    """

    def __init__(self, enlarge: Head, factor: int = 2) -> None:
        check_count("factor", factor, least=2)
        self.enlarge, self.factor = enlarge, factor

    def check_images(self, image: Tensor) -> None:
        """Check that these are images [N, C, H, W] in [0, 1], of a divisible size.

        Raises:
            ValueError: If they are not.
        """
        check_restorable("super-resolution", image)
        _check_plane("super-resolution", image)
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"the images are {height} by {width} pixels, which is not divisible by "
                f"{self.factor} for super-resolution; resize them, or pass another factor to "
                "SuperResolution and train the head with it"
            )

    def __call__(self, model: Any, image: Images) -> Scalar:
        """The loss."""
        self.check_images(image)
        output = self.enlarge(model, self.shrink(image))
        return restoration_error("enlarge", output, image).square().mean()

    def shrink(self, image: Images) -> Float[Tensor, "batch channels rows columns"]:
        """The small images that the head sees.

        Examples:
            >>> SuperResolution(lambda model, images: images).shrink(torch.eye(4)[None, None])
            tensor([[[[1., 0.],
                      [0., 1.]]]])
        """
        size = [length // self.factor for length in image.shape[-2:]]
        return F.interpolate(image, size=size, mode="bilinear", align_corners=True)


class Rotation:
    """The error of a head that tells how an image was flipped or turned.

        k = a view of each image, drawn uniformly
        loss = mean of −log softmax(classify(model, views[k](x)))_k

    The rotation objective of [GraTa](https://arxiv.org/abs/2408.07343) (Table 5), after the task of
    [test-time training](https://arxiv.org/abs/1909.13231), which has turns only. The six classes
    are GraTa's: flipped left to right, flipped top to bottom, turned counter-clockwise by 90°, 180°
    and 270°, and unchanged. A left eye that is flipped looks like a right eye, so that on fundus
    photographs some classes can hardly be told apart. Train a head on the mean over all views of
    each image: views of one image may differ less than two images do, so that single views teach
    it slowly.

    Views are drawn once per step, and kept at displaced weights; `begin_step`, which an adapter
    calls, draws new ones. Cost: one forward pass. State: the generator.

    Args:
        classify: `(model, images) -> logits` [N, number of views].
        views: The classes.
        generator: The generator of the views, on the CPU; by default a new one with seed 0.

    Raises:
        TypeError: If the generator is none.
        ValueError: If there are fewer than two views, or the generator is not on the CPU; in a
            call, if the images are not [N, C, H, W], if a view changes their shape, as a quarter
            turn does where height and width differ, or if the head's output has another shape.

    Examples:
        >>> objective = Rotation(lambda model, images: torch.zeros(len(images), 6))
        >>> objective(None, torch.rand(2, 3, 8, 8))  # log 6
        tensor(1.7918)
    """

    def __init__(
        self,
        classify: Head,
        views: Sequence[View] = ROTATION_VIEWS,
        generator: torch.Generator | None = None,
    ) -> None:
        if len(views) < 2:
            raise ValueError(f"views has {len(views)} view(s); give at least 2 to tell apart")
        self.classify, self.views = classify, tuple(views)
        self.generator = own_generator(generator)
        self._drawn: Tensor | None = None

    def begin_step(self, images: Tensor) -> None:
        """Draw new views."""
        self._drawn = None

    def check_images(self, image: Tensor) -> None:
        """Check that these are images [N, C, H, W] whose shape no view changes.

        Raises:
            ValueError: If they are not.
        """
        _check_plane("rotation", image)
        blank = torch.empty(image.shape[1:], device="meta")
        for view in self.views:
            if view.forward(blank).shape != blank.shape:
                raise ValueError(
                    f"the view {view.name!r} changes the shape of images of {image.shape[-2]} by "
                    f"{image.shape[-1]} pixels, so that they make no batch; make images square, or "
                    "pass views that keep their shape"
                )

    def __call__(self, model: Any, image: Images) -> Scalar:
        """The loss."""
        self.check_images(image)
        if self._drawn is None or len(self._drawn) != len(image):
            self._drawn = torch.randint(len(self.views), (len(image),), generator=self.generator)
        changed = [
            self.views[k].forward(each) for k, each in zip(self._drawn.tolist(), image, strict=True)
        ]
        logits = self.classify(model, torch.stack(changed))
        shape = (len(image), len(self.views))
        if not isinstance(logits, Tensor) or logits.shape != shape:
            raise ValueError(
                f"classify returned {_described(logits)} for {shape[0]} image(s) and {shape[1]} "
                f"views; it must return logits of shape {list(shape)}"
            )
        return F.cross_entropy(at_least_float32(logits), self._drawn.to(logits.device))

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, a tensor."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.generator.set_state(state_dict["generator"].cpu())


def _check_plane(task: str, image: Tensor) -> None:
    if image.dim() != 4:
        raise ValueError(f"{task} needs images [N, C, H, W], but got shape {list(image.shape)}")


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)}"
    return f"a {type(output).__name__}"
