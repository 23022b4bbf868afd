"""What a step costs, as ratios to the passes that no method can do without.

Everything is measured in one process, in turn, so that ratios of one round see the same machine.
The floor of surgery on K objectives is the forward pass, K bare backward passes and the base's
step; that of SAM is two plain training passes.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torchjd.aggregation import PCGrad as PeerPCGrad
from torchjd.autojac import backward as peer_backward
from torchjd.autojac import jac_to_grad

import gradkit as gk
from benchmarks.machine import describe_machine
from examples.fundus.network import ResUNet34
from gradkit.engines import EngineName

Step = Callable[[], object]


@dataclass(frozen=True)
class Speed:
    """Time PCGrad and SAM beside their floors and beside TorchJD and pytorch-optimizer.

    Writes OUT/speed.json and OUT/speed.md.
    """

    shapes: str = "2x64,4x128"
    """Batch size and image side of each measured case, BATCHxSIDE, separated by commas."""
    objectives: int = 4
    """K, the number of objectives for PCGrad."""
    width: int = 64
    """Channels of the network's first stage; 64 is the published ResUNet-34."""
    rounds: int = 9
    """Rounds in which every variant takes one step."""
    threads: int = 2
    """Threads of the CPU."""
    out: Path = Path("runs/benchmark-speed")
    """Folder of the results."""

    def run(self) -> None:
        """Measures, writes and prints the table."""
        torch.set_num_threads(self.threads)
        rows = []
        for shape in self.shapes.split(","):
            batch, side = map(int, shape.split("x"))
            torch.manual_seed(0)
            image = torch.rand(batch, 3, side, side)
            for name, variants in (
                (f"PCGrad, K = {self.objectives}", self._surgery(image)),
                ("SAM", self._sam(image)),
            ):
                for variant, ratio in _ratios(variants, self.rounds).items():
                    rows.append({"shape": shape, "method": name, "variant": variant, **ratio})
        rows += [_overhead(count) for count in (1, 4)]
        self.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": describe_machine(), "rounds": self.rounds, "rows": rows}
        (self.out / "speed.json").write_text(json.dumps(record, indent=1) + "\n")
        table = _table(record)
        (self.out / "speed.md").write_text(table)
        print(table)

    def _network(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = ResUNet34(width=self.width)
        return model, torch.optim.SGD(model.parameters(), lr=1e-6)

    def _losses(self, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
        """K losses of one forward pass: thresholds that pull the same logits different ways."""
        logits = model(image)
        return {
            str(k): (logits - (k - self.objectives / 2)).square().mean(dim=(0, 2, 3))[k % 2]
            for k in range(self.objectives)
        }

    def _surgery(self, image: Tensor) -> Mapping[str, Step]:
        model, base = self._network()
        parameters = list(model.parameters())

        def floor() -> None:
            losses = list(self._losses(model, image).values())
            for number, loss in enumerate(losses):
                grads = torch.autograd.grad(loss, parameters, retain_graph=number < len(losses) - 1)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            base.step()
            base.zero_grad()

        variants: dict[str, Step] = {"floor": floor}
        for engine in ("functional", "inplace"):
            variants[f"gradkit, {engine}"] = self._wrapped(engine, image, gk.PCGrad())
        model_peer, base_peer = self._network()
        aggregator = PeerPCGrad()

        def peer() -> None:
            peer_backward(list(self._losses(model_peer, image).values()))
            jac_to_grad(list(model_peer.parameters()), aggregator)
            base_peer.step()
            base_peer.zero_grad()

        variants[f"TorchJD {version('torchjd')}"] = peer
        return variants

    def _wrapped(self, engine: EngineName, image: Tensor, *chain: gk.Transform) -> Step:
        model, base = self._network()
        optimizer = gk.wrap(base, *chain, model=model, engine=engine)

        def step() -> None:
            optimizer.step(lambda: self._losses(model, image))
            optimizer.zero_grad()

        return step

    def _sam(self, image: Tensor) -> Mapping[str, Step]:
        model, base = self._network()

        def loss_of(network: nn.Module) -> Tensor:
            return network(image).square().mean()

        def floor() -> None:
            for _ in range(2):
                base.zero_grad()
                loss_of(model).backward()
            base.step()

        def wrapped(engine: EngineName) -> Step:
            network, plain = self._network()
            optimizer = gk.wrap(plain, gk.SAM(), model=network, engine=engine)

            def step() -> None:
                optimizer.step(lambda: loss_of(network))
                optimizer.zero_grad()

            return step

        peer_model, _ = self._network()
        peer = pytorch_optimizer.SAM(
            list(peer_model.parameters()), base_optimizer=torch.optim.SGD, lr=1e-6
        )

        def peer_step() -> None:
            loss_of(peer_model).backward()
            peer.first_step(zero_grad=True)
            loss_of(peer_model).backward()
            peer.second_step(zero_grad=True)

        return {
            "floor": floor,
            "gradkit, functional": wrapped("functional"),
            "gradkit, inplace": wrapped("inplace"),
            f"pytorch-optimizer {version('pytorch_optimizer')}": peer_step,
        }


def _ratios(variants: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Median time (ms) of each variant, and its median ratio to the floor with a 95% interval.

    Ratios are taken within rounds; the interval is the binomial one of the median.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in variants.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in variants.items():
            start = perf_counter()
            step()
            times[name].append(perf_counter() - start)
    result = {}
    for name, values in times.items():
        ratios = sorted(value / floor for value, floor in zip(values, times["floor"], strict=True))
        low, high = _median_ranks(rounds)
        result[name] = {
            "milliseconds": statistics.median(values) * 1e3,
            "ratio": statistics.median(ratios),
            "low": ratios[low],
            "high": ratios[high],
        }
    return result


def _median_ranks(count: int) -> tuple[int, int]:
    """Ranks between which the median lies with a probability of at least 95%, if there are any."""
    half = torch.distributions.Binomial(count, torch.tensor(0.5))
    below = half.log_prob(torch.arange(count + 1.0)).exp().cumsum(0)
    low = int((below <= 0.025).sum())
    return max(low - 1, 0), min(count - low, count - 1)


def _overhead(count: int) -> dict[str, object]:
    """What gradkit adds to the same passes written by hand, on a network of three small layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    parameters = list(model.parameters())
    x = torch.rand(4, 8)
    closures = {str(k): (lambda k=k: model(x)[:, k].mean()) for k in range(count)}
    chain = (gk.PCGrad(),) if count > 1 else ()
    base = torch.optim.SGD(parameters, lr=1e-9)
    optimizer = gk.wrap(base, *chain, model=model)

    def by_hand() -> None:
        for closure in closures.values():
            grads = torch.autograd.grad(closure(), parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        base.step()

    differences = []
    for number in range(600):
        start = perf_counter()
        by_hand()
        middle = perf_counter()
        optimizer.step(closures)
        if number >= 100:
            differences.append((perf_counter() - middle) - (middle - start))
    method = f"engine overhead, K = {count}"
    milliseconds = statistics.median(differences) * 1e3
    return {"shape": "-", "method": method, "variant": "gradkit", "milliseconds": milliseconds}


def _table(record: Mapping[str, object]) -> str:
    lines = ["| case | method | variant | ms | ratio to the floor [95% interval] |",
             "|---|---|---|--:|--:|"]  # fmt: skip
    rows: list[dict[str, float]] = record["rows"]  # type: ignore[assignment]
    for row in rows:
        ratio = (
            f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if "ratio" in row else ""
        )
        lines.append(
            f"| {row['shape']} | {row['method']} | {row['variant']} "
            f"| {row['milliseconds']:.2f} | {ratio} |"
        )
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())  # type: ignore[attr-defined]
    lines += ["", f"Medians of {record['rounds']} rounds. Machine: {machine}."]
    return "\n".join(lines) + "\n"
