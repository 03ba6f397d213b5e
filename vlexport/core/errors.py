"""Every error a user can meet, its stable code and its exit code.

The tree::

    VlexportError
    ├── InputError           exit 1   the input is wrong
    │   ├── ModelFileError            a model file, its structure or its content
    │   ├── CaptureError              the model cannot be captured as one graph
    │   │   └── RefusedInputError     an input breaks a check that stayed in the graph
    │   ├── DataError                 samples, labels, preprocessing
    │   └── BundleError               a bundle that cannot be read
    ├── UsageError           exit 2   the command line, a recipe or an option is wrong
    ├── GateError            exit 3   a numeric or accuracy gate failed, or `verify` did
    ├── CapabilityError      exit 4   this machine cannot make or verify what was asked
    └── InternalError        exit 70  a contract inside vlexport was broken: our bug

Exit 5, inconclusive, is no error: verdicts and noisy measurements decide it.

A message says what is wrong, ``where`` says where, ``hint`` says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_INPUT = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_CAPABILITY = 4
EXIT_INCONCLUSIVE = 5
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130

CODES: dict[str, str] = {
    # 01: model files
    "VLX0101": "the model file does not exist",
    "VLX0102": "the model file is a directory",
    "VLX0103": "the model file is empty",
    "VLX0104": "the model file is of no known format",
    "VLX0105": "the model archive is damaged or truncated",
    "VLX0106": "the model archive holds something that could run code or escape its folder",
    "VLX0107": "the model file needs --arch to become a model",
    "VLX0108": "the model file holds pickled code",
    "VLX0109": "the weights do not fit the architecture",
    "VLX0110": "the architecture cannot be made",
    "VLX0111": "the model archive was written by a later version",
    "VLX0112": "the model archive was not written by vlexport.save",
    "VLX0113": "the model is quantized already",
    "VLX0114": "the model is a name on a hub, and nothing is fetched",
    "VLX0115": "the model directory is not understood",
    # 02: samples, labels and preprocessing
    "VLX0201": "the data does not exist or is of no known kind",
    "VLX0202": "the data is empty",
    "VLX0203": "a sample cannot be read",
    "VLX0204": "a sample holds NaN or infinity",
    "VLX0205": "a sample does not fit the model's input",
    "VLX0206": "image data without known preprocessing",
    "VLX0207": "the preprocessing is not understood",
    "VLX0208": "the labels do not match the model's",
    "VLX0209": "the data's function cannot be used",
    "VLX0210": "the data has no labels",
    "VLX0211": "the reference is no better than guessing",
    "VLX0212": "the metric's function cannot be used",
    "VLX0213": "a value becomes NaN or infinite on a calibration sample",
    "VLX0214": "there are too few calibration samples",
    "VLX0215": "the calibration table cannot be used",
    "VLX0216": "a selection of tokens needs calibration samples",
    "VLX0217": "a calibration sample cannot be used",
    "VLX0218": "a quantized precision needs calibration samples",
    # 03: capture
    "VLX0301": "the model is in train mode",
    "VLX0302": "the example inputs do not fit the model",
    "VLX0303": "the model cannot be exported as one graph",
    "VLX0304": "the captured graph does not agree with the model",
    "VLX0305": "the model changes its own buffers or inputs",
    "VLX0306": "the model's outputs are not tensors",
    "VLX0307": "the captured model is quantized already",
    # 04: passes and the numeric gate
    "VLX0401": "a pass changed what the model computes",
    "VLX0402": "the gate's probes are blind",
    "VLX0403": "a pass left an invalid program",
    "VLX0404": "a pass does not reach a fixed point",
    "VLX0405": "the order of passes is impossible",
    "VLX0406": "a pass edited a parameter in place",
    "VLX0407": "a pass did not establish a fact it claims",
    "VLX0408": "an outside optimizer failed or damaged the graph",
    "VLX0409": "a value does not fit the type that everything must have",
    "VLX0410": "the sizes do not fit in memory",
    "VLX0411": "the model's tokens cannot be reduced",
    "VLX0412": "the model's tokens cannot be frozen",
    "VLX0413": "the model has no tokens to freeze",
    # 05: targets
    "VLX0501": "the target's runtime is not installed",
    "VLX0502": "the target does not run this precision",
    "VLX0503": "the target cannot express an operator",
    "VLX0504": "the artifact does not agree with the source program",
    "VLX0505": "the runtime refused the artifact",
    "VLX0506": "the runtime's process ended unexpectedly",
    "VLX0507": "an input does not fit the artifact",
    "VLX0508": "the runtime lacks the artifact's execution provider",
    "VLX0509": "the artifact holds compiled code",
    "VLX0510": "no engine can be compiled",
    "VLX0511": "the engine was not compiled here",
    # 06: bundles
    "VLX0601": "the bundle does not exist or is no bundle",
    "VLX0602": "the bundle was altered",
    "VLX0603": "the bundle was written by a later version",
    "VLX0604": "the output exists already",
    "VLX0605": "a path leaves the bundle",
    "VLX0606": "a golden check failed",
    "VLX0607": "the output cannot be written",
    # 07: command line and recipes
    "VLX0701": "no such target",
    "VLX0702": "a gate is not understood",
    "VLX0703": "an option is not understood",
    "VLX0705": "a recipe is not understood",
    "VLX0706": "a dynamic dim has no upper bound, and the target wants one",
    "VLX0707": "a value to bake does not fit the model",
    "VLX0708": "the preprocessing cannot become part of the model",
    "VLX0716": "the preprocessing cannot be diagnosed",
    # 08: judging and measuring
    "VLX0803": "latency cannot be told: too noisy, or the timing is not real",
    "VLX0804": "a gate needs something that was not measured",
    "VLX0805": "a search cannot be made",
    "VLX0811": "no share of the layers in integers holds the gates",
    # 09: our bugs
    "VLX0901": "vlexport broke its own contract",
    # 10: plugins
    "VLX1001": "two installed packages offer the same pass or target",
    "VLX1002": "a plugin was written for another version of the interface",
    "VLX1003": "a plugin cannot be used",
    # 11: models of several components
    "VLX1101": "components.toml is not understood",
    "VLX1102": "the components do not fit together",
}
"""Stable code → the kind of problem it stands for. A test keeps it equal to the codes that are really raised."""


class VlexportError(Exception):
    """An error with a stable code.

    Args:
        code: A key of :data:`CODES`.
        message: What is wrong, one sentence, with the values involved.
        where: The file, option, sample, node or module path concerned.
        hint: What to type or change.
    """

    exit_code = EXIT_INTERNAL

    def __init__(self, code: str, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.where = where
        self.hint = hint

    def as_dict(self) -> dict[str, str]:
        """The ``error`` object of ``--json``."""
        return {"code": self.code, "message": self.message, "where": self.where, "hint": self.hint}


class InputError(VlexportError):
    """The input is wrong (exit 1)."""

    exit_code = EXIT_INPUT


class ModelFileError(InputError):
    """A model file, its structure or its content is wrong."""


class CaptureError(InputError):
    """The model cannot be captured as one graph."""


class RefusedInputError(CaptureError, RuntimeError):
    """An input breaks a check that the model makes; it is torch's own error too, as every other failure of a call."""


class DataError(InputError):
    """Samples, labels or preprocessing are wrong."""


class BundleError(InputError):
    """A bundle cannot be read, or an output cannot be written."""


class UsageError(VlexportError):
    """The command line, a recipe or an option is wrong (exit 2)."""

    exit_code = EXIT_USAGE


class GateError(VlexportError):
    """A numeric or accuracy gate failed, or `verify` did (exit 3)."""

    exit_code = EXIT_GATE


class CapabilityError(VlexportError):
    """This machine cannot make or verify what was asked (exit 4)."""

    exit_code = EXIT_CAPABILITY


class InternalError(VlexportError):
    """A contract inside vlexport was broken: our bug (exit 70)."""

    exit_code = EXIT_INTERNAL


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``known``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
