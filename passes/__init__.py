"""Passes: graph transformations with a contract that the runner checks, and their catalogue.

A pass is one file, one line here, one test and one golden file. Nothing registers itself at import. Installed packages
offer further ones as entry points (``core/plugins``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

if __name__ != "vlexport.passes":
    raise ImportError("import vlexport.passes, not passes: the folder at the top is the package's source")

from vlexport.core.errors import UsageError, nearest
from vlexport.core.plugins import Offer, load, offers, only_one, unusable
from vlexport.passes.base import API_VERSION, STAGES, Pass

CATALOGUE: dict[str, str] = {
    "canonicalize": "vlexport.passes.canonicalize:Canonicalize",
    "fold-constants": "vlexport.passes.fold_constants:FoldConstants",
    "eliminate-dead": "vlexport.passes.eliminate_dead:EliminateDead",
    "merge-duplicates": "vlexport.passes.merge_duplicates:MergeDuplicates",
    "legalize-repeats": "vlexport.passes.legalize_repeats:LegalizeRepeats",
    "eliminate-layout": "vlexport.passes.eliminate_layout:EliminateLayout",
    "merge-pieces": "vlexport.passes.merge_pieces:MergePieces",
    "merge-layout": "vlexport.passes.merge_layout:MergeLayout",
    "raise-patch-embedding": "vlexport.passes.raise_patch_embedding:RaisePatchEmbedding",
    "eliminate-round-trips": "vlexport.passes.eliminate_round_trips:EliminateRoundTrips",
    "raise-norms": "vlexport.passes.raise_norms:RaiseNorms",
    "raise-activations": "vlexport.passes.raise_activations:RaiseActivations",
    "raise-attention": "vlexport.passes.raise_attention:RaiseAttention",
    "fold-preprocess": "vlexport.passes.fold_preprocess:FoldPreprocess",
    "reparameterize": "vlexport.passes.reparameterize:Reparameterize",
    "fold-affine": "vlexport.passes.fold_affine:FoldAffine",
    "merge-linears": "vlexport.passes.merge_linears:MergeLinears",
    "legalize-selections": "vlexport.passes.legalize_selections:LegalizeSelections",
    "narrow-to-demand": "vlexport.passes.narrow_to_demand:NarrowToDemand",
}
"""Id → where the class lies, in pipeline order. Imported when used. These run in every build."""

ON_REQUEST: dict[str, str] = {
    "reduce-tokens": "vlexport.passes.reduce_tokens:ReduceTokens",
    "cast-floats": "vlexport.passes.cast_floats:CastFloats",
    "smooth-activations": "vlexport.passes.smooth_activations:SmoothActivations",
    "equalize-ranges": "vlexport.passes.equalize_ranges:EqualizeRanges",
    "quantize": "vlexport.passes.quantize:Quantize",
    "fold-casts": "vlexport.passes.fold_casts:FoldCasts",
    "freeze-tokens": "vlexport.passes.freeze_tokens:FreezeTokens",
}
"""Id → where the class lies, of passes that a build runs where its options ask for what they do."""

CLEAN_UP = ("merge-duplicates", "eliminate-round-trips")
"""Ids of passes that run once more behind all that targets share: folding a norm leaves layout that meets layout."""

GROUP = "vlexport.passes"
"""Entry points of plugins: id → class."""


def offered_passes() -> dict[str, tuple[Offer, ...]]:
    """Id → who offers it: the catalogue in pipeline order, what runs on request, then installed plugins."""
    return offers(GROUP, {**CATALOGUE, **ON_REQUEST})


def pass_class(name: str, *, others: Iterable[str] = ()) -> type[Pass[Any]]:
    """The class behind an id. A plugin's code is imported here.

    Args:
        name: Of a pass over Programs.
        others: Further ids that a wrong one may have meant.

    Raises:
        UsageError: VLX0703 for an unknown id, with the nearest one.
        CapabilityError: VLX1001, VLX1002, VLX1003 for a plugin that cannot be used.
    """
    known = offered_passes()
    if name not in known:
        names = [*known, *others]
        raise UsageError("VLX0703", f"no pass '{name}'{nearest(name, names)}", hint=f"known: {', '.join(names)}")
    offer = only_one(known[name])
    found: type[Pass[Any]] = load(offer, base=Pass, api_version=API_VERSION)
    if found.name != name:
        raise unusable(offer, f"its class calls itself '{found.name}'")
    if found.stage not in STAGES:
        raise unusable(offer, f"there is no stage '{found.stage}'{nearest(found.stage, STAGES)}")
    return found
