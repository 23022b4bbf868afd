"""Words that are no command, option or choice: what they may have meant, in one line."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import main as benchmarks
from examples.common.command_line import interruptible, run, shorten
from examples.common.suggestions import nearest
from examples.fundus.__main__ import main as fundus

EXAMPLE = "python -m examples.fundus"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "there is no command 'trian'; choose from compare, train, heads, adapt, export; "
         f"did you mean train? (see {EXAMPLE} --help)"),
        ("Train", "did you mean train?"),
        ("trian --epochs 3", "did you mean train?"),
        ("", "a command is missing before the options; choose from compare, train, heads, adapt, "
         "export"),
        ("--epochs 3", "a command is missing before the options"),
        ("train --epoch 3", f"train has no option --epoch; did you mean --epochs? (see {EXAMPLE} "
         "train --help)"),
        ("train --epoch=3", "train has no option --epoch; did you mean --epochs?"),
        ("train --learning_rat 3", "--learning_rat; did you mean --learning-rate?"),
        ("train --epochs 3 --witdh 3", "train has no option --witdh; did you mean --width?"),
        ("train --batch 3", "did you mean --batch-size?"),
        ("train -epochs 3", "train has no option -epochs; did you mean --epochs?"),
        ("train --lr 1", "--lr; it is for compare and adapt; did you mean --learning-rate?"),
        ("train --no-resum", "did you mean --no-resume?"),
        ("train --zzz", f"train has no option --zzz (see {EXAMPLE} train --help)"),
        ("compare --target centre_b", "it is for adapt; did you mean --targets?"),
        ("adapt --targets centre_b", "it is for compare; did you mean --target?"),
        ("export --domain centre_a", "did you mean --domains?"),
        ("train extra", "train takes no 'extra' here; values follow their option's name"),
        ("train --resume yes", "train takes no 'yes' here"),
        ("train --resume=yes", "--resume takes no value; leave =yes out"),
        ("train --epochs", "--epochs needs a value"),
        ("train --out --resume", "--out needs a value"),
        ("train --epochs 1e3", "--epochs is '1e3'; give a whole number"),
        ("compare --lr fast", "--lr is 'fast'; give a number"),
        ("adapt", f"adapt needs --checkpoint (see {EXAMPLE} adapt --help)"),
        ("compare --methods none,tnet", "'tnet'; choose from none, ptbn, tent, grata, dua"),
        ("compare --methods none,tnet", "; did you mean tent?"),
        ("compare --methods GraTA", "did you mean grata?"),
        ("train --source centra_b", "did you mean centre_b?"),
        ("train --source centre_z", "centre_e\n"),  # as near to one as to another
        ("compare --statistics tets", "did you mean test?"),
        ("compare --statistics mxed:0.8", "did you mean mixed?"),
        ("compare --device cup", "did you mean cpu?"),
        ("compare --data-root synthtic", "did you mean synthetic?"),
    ],
)  # fmt: skip
def test_the_example(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert message in complaint(capsys, fundus, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("aligment", "composition, tta; did you mean alignment? (see python -m"),
        ("alignment --problem toi", "choose from toy, fonseca, zdt, digits, fundus; did you mean "
         "toy? (see python -m benchmarks alignment --help)"),
        ("alignment --problem Digits", "did you mean digits?"),
        ("alignment --problem toy --seed 3", "it is for fundus, speed and composition; did you "
         "mean --seeds?"),
        ("alignment --problem toy --strategies pcgrad", "did you mean PCGrad?"),
        ("alignment --problem digits --validation=1", "--validation takes no value"),
        ("alignment --seeds None", "alignment needs --problem"),
        ("fundus", "fundus needs --data-root and --models"),
        ("speed --part weights", "did you mean --parts?"),
        ("speed --parts wights", "did you mean weights?"),
    ],
)  # fmt: skip
def test_the_benchmarks(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert message in complaint(capsys, benchmarks, words)


def complaint(capsys: pytest.CaptureFixture[str], main, words: str) -> str:  # type: ignore[no-untyped-def]
    """The one line that a call leaves."""
    try:
        status = main(words.split())
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_the_process_arguments_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["program", "trian"])
    with pytest.raises(SystemExit):
        fundus()
    assert "did you mean train?" in capsys.readouterr().err


def test_nearest() -> None:
    assert nearest("", ["a", "b"]) is None
    assert nearest("a", []) is None
    assert nearest("train_imags", ["train-images", "target-images"]) == "train-images"
    assert nearest("b", ["batch-size", "beta"]) is None  # both begin with it


def test_a_remedy_is_not_replaced_by_an_outer_one(capsys):
    def command():
        with interruptible("outer", lambda: True), interruptible("inner", lambda: True):
            raise KeyboardInterrupt

    assert run(command) == 130
    assert capsys.readouterr().err == "interrupted; inner\n"


def test_frames_are_shortened():
    framed = "╭─ Bad ──╮\n│ no such │\n│ option │\n│ ────── │\n│ hints │\n╰───────╯"
    assert shorten(framed) == "no such option"
    assert shorten("plain words") == "plain words"
    assert shorten("") == ""
