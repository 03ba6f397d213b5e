"""Names that Xcode can make a Swift class and its properties of. No torch.

Xcode generates a class called as the package (``SolarCells.mlpackage`` → ``SolarCells``), with a property for every
input and output. A name that is no Swift identifier is altered by it, or stops the app from compiling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
"""ASCII identifiers: Swift takes more, a Core ML program does not."""

LABEL, PROBABILITIES = "classLabel", "classLabel_probs"
"""Outputs of a classifier, as coremltools calls them."""
_RESERVED = frozenset(
    re.findall(r"\w+", """
    Any Protocol Self Type as associatedtype await break case catch class continue default defer deinit do else
    enum extension fallthrough false fileprivate for func guard if import in init inout internal is let nil open
    operator precedencegroup private protocol public repeat rethrows return self static struct subscript super
    switch throw throws true try typealias var where while featureNames featureValue provider
    """)
)  # fmt: skip
"""Swift's keywords, and what the generated classes define themselves."""


def is_swift_identifier(name: str) -> bool:
    """Whether a class or property can be called so as it stands."""
    return re.fullmatch(IDENTIFIER, name) is not None and name not in _RESERVED


def swift_identifier(name: str) -> str:
    """The nearest identifier: other characters become ``_``, so does an empty name; keywords get a ``_`` behind."""
    found = re.sub(r"[^A-Za-z0-9_]+", "_", name) or "_"
    found = f"_{found}" if found[0].isdigit() else found
    return f"{found}_" if found in _RESERVED else found


def swift_class_name(name: str) -> str:
    """A type's name as Swift spells them: ``solar_cells`` → ``SolarCells``."""
    words = re.findall(r"[A-Za-z0-9]+", name)
    return swift_identifier("".join(word[0].upper() + word[1:] for word in words))


def feature_names(inputs: Iterable[str], outputs: Iterable[str], *, taken: Iterable[str] = ()) -> tuple[list[str], ...]:
    """Names of inputs and outputs in the package: identifiers, each used once.

    Args:
        inputs: Public names, in order.
        outputs: Public names, in order. One that an input has already gets ``_out``.
        taken: Names that something else has.

    Returns:
        Those of the inputs, and those of the outputs.
    """
    used = set(taken)

    def given(name: str, suffix: str) -> str:
        found, number = swift_identifier(name), 2
        if found in used and suffix:
            found += suffix
        stem = found
        while found in used:
            found, number = f"{stem}_{number}", number + 1
        used.add(found)
        return found

    first = [given(name, "") for name in inputs]
    return first, [given(name, "_out") for name in outputs]
