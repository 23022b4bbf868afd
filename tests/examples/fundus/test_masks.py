import pytest

from examples.fundus.masks import mask_names


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["a/0.png", "b/0.png"], ["a/0.png", "b/0.png"]),
        (["0.PNG", "0", "0.tar.gz"], ["0.PNG.png", "0.png", "0.tar.gz.png"]),
        (["a/../0.png", "a/0.jpg"], ["0.png", "a/0.jpg.png"]),
        (["0", "0.png", "0"], ["0.png.png", "0.png", "0.png.png.png"]),
    ],
)
def test_names_of_masks(images, masks):
    assert mask_names(images) == masks
