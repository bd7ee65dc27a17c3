"""Logs besides ``summary.csv``: a curve as PNG, TensorBoard, Weights & Biases.

Each needs a package that mhacut does not install by itself and imports only for that log. If it is missing,
the run is refused before the work. A log that fails later ends with a message, and training continues.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mhacut.errors import MhacutError, option_name
from mhacut.runtime.files import write_whole
from mhacut.runtime.progress import Reporter

Row = Mapping[str, float | None]

_NEEDS = {
    "png": ("matplotlib", "plot"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
}
"""Module that each log needs, and the extra of mhacut that installs it."""
_CURVE, _EVENTS = "curve.png", "tensorboard"
"""Names of logs in the directory of a run."""


def check_logs(names: Sequence[str]) -> None:
    """Raise a :class:`MhacutError` that names the package to install, if a log lacks one."""
    for name in names:
        module, extra = _NEEDS[name]
        if importlib.util.find_spec(module) is None:
            asked = option_name("log", name)
            raise MhacutError(f"{asked}: needs the package {module}; pip install 'mhacut[{extra}]'")


def remove_logs(folder: Path) -> None:
    """Remove the logs of an earlier run in ``folder``, so that nobody takes its curves for another's.

    One that cannot be removed stays: it is no reason to end a run.
    """
    for path in (folder / _CURVE, *(folder / _EVENTS).glob("events.out.tfevents.*")):
        with suppress(OSError):
            path.unlink()


class _Log(Protocol):
    def write(self, rows: Sequence[Row]) -> None:
        """Take every row so far; the last one is new."""

    def close(self) -> None:
        """Finish: no more rows will come."""


class Logs:
    """The logs that were asked for; leaving the context closes them."""

    def __init__(
        self, names: Sequence[str], folder: Path, options: Mapping[str, Any], reporter: Reporter
    ) -> None:
        """Open the logs.

        Args:
            names: keys of :data:`_NEEDS`.
            folder: directory of the run.
            options: options of the run, for logs that store them.
            reporter: receives a message where a log fails.
        """
        self._reporter = reporter
        self._open: dict[str, _Log] = {}
        for name in names:
            self._guarded(name, partial(self._add, name, folder, options))

    def write(self, rows: Sequence[Row]) -> None:
        """Write every row so far, of which the last is new."""
        for name, log in list(self._open.items()):
            self._guarded(name, partial(log.write, rows))

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *error: object) -> None:
        for name, log in list(self._open.items()):
            self._guarded(name, log.close)

    def _add(self, name: str, folder: Path, options: Mapping[str, Any]) -> None:
        self._open[name] = _opened(name, folder, options)

    def _guarded(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # third parties' disks, networks and accounts fail in many ways
            self._open.pop(name, None)
            self._reporter.log(
                f"{option_name('log', name)}: stopped logging, training continues: {type(error).__name__}: "
                f"{error!s:.200}"
            )


def _opened(name: str, folder: Path, options: Mapping[str, Any]) -> _Log:
    if name == "png":
        return _Curve(folder / _CURVE)
    return _TensorBoard(folder) if name == "tensorboard" else _WandB(folder, options)


class _Curve:
    """PNG of loss and accuracy over epochs, drawn again for each row."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, rows: Sequence[Row]) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.5), layout="constrained")
        losses, accuracy = figure.subplots(1, 2)
        epochs = [(row["epoch"] or 0) + 1 for row in rows]
        for axes, names in ((losses, ("train_loss", "eval_loss")), (accuracy, ("eval_top1",))):
            for name in names:
                if rows[-1][name] is not None:
                    axes.plot(epochs, [row[name] for row in rows], marker="o", label=name)
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        losses.set_ylabel("loss")
        accuracy.set_ylabel("top-1, %")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=120)
        write_whole(self.path, drawn.getvalue(), overwrite=True)

    def close(self) -> None:
        pass


class _TensorBoard:
    """TensorBoard events, one scalar per column, in a file that the first row makes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _EVENTS
        self._writer: Any = None

    def write(self, rows: Sequence[Row]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        for name, value in rows[-1].items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, int(rows[-1]["epoch"] or 0))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB:
    """Run of Weights & Biases, one metric per column."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        import wandb

        config = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
        self._run: Any = wandb.init(project="mhacut", dir=str(folder), name=folder.name, config=config)

    def write(self, rows: Sequence[Row]) -> None:
        self._run.log({name: value for name, value in rows[-1].items() if value is not None})

    def close(self) -> None:
        self._run.finish()
