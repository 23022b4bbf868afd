import pytest

from examples.common.adaptation import Stream
from examples.common.scores import CaseScores
from examples.fundus.methods import BY_DEFAULT
from examples.fundus.results import make_result, markdown_table


def scored(image, mean):
    return CaseScores(image, {"disc": mean, "cup": mean})


def stream_of(*means):
    return Stream([scored(f"{i}.png", mean) for i, mean in enumerate(means)])


def table_of(methods, statistics):
    return markdown_table(
        [make_result("a", "b", m, statistics, 1e-4, 0, stream_of(1, 2)) for m in methods], seed=0
    )


def test_an_interval_needs_more_than_one_image():
    results = [make_result("a", "b", "none", "test", 1e-4, 0, stream_of(60)) for _ in range(2)]
    assert "| 1 | 60.00 | 60.00 | 60.00 [-] |" in markdown_table(results, seed=0)


@pytest.mark.parametrize(
    ("methods", "statistics", "note"),
    [
        (BY_DEFAULT, "mixed:0.8", "differ: test for ptbn, mixed:0.8 for tent and grata."),
        (["grata", "ptbn"], "source", "differ: test for ptbn, source for grata."),
        (BY_DEFAULT, "test", None),
        (BY_DEFAULT, "mixed:0", None),  # which is the same as test
        (["none", "tent", "grata"], "mixed:0.8", None),
        (["none", "ptbn"], "mixed:0.8", None),
    ],
)
def test_the_table_tells_when_statistics_differ_besides_learning(methods, statistics, note):
    last = table_of(methods, statistics).splitlines()[-1]
    if note is None:
        assert last.startswith("Dice in %.")
    else:
        assert last.startswith("Statistics ")
        assert note in last
        assert last.endswith("with `--statistics test` it is due to learning.")
