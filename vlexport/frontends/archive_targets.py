"""Which operators a node of a saved graph may call.

``torch.ops.aten`` alone is no border: ``aten::save`` and ``aten::from_file`` open any file, ``aten::wait`` and the
string operators belong to TorchScript. So an ATen overload must exist, compute on tensors, and take nothing but
tensors, numbers and the few named mode strings.
"""

from __future__ import annotations

import re

from vlexport.frontends import decomposed
from vlexport.frontends.compat import declare_decomposed_operators, find_signature
from vlexport.ir import quant_ops

OPERATOR_FUNCTIONS = frozenset(
    {"eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "pow", "truediv"}
    | {"and_", "or_", "lshift", "rshift", "getitem"}
)
MATH_FUNCTIONS = frozenset({"trunc", "ceil", "floor", "sqrt"})
SYMBOL_FUNCTIONS = frozenset({"sym_not", "sym_int", "sym_float", "sym_ite", "sym_max", "sym_min", "sym_sqrt"})
HIGHER_ORDER = frozenset({"cond", "wrap_with_set_grad_enabled", "wrap_with_autocast"})

_DECOMPOSED = f"torch.ops.{decomposed.NAMESPACE}"
_OVERLOAD = re.compile(r"torch\.ops\.(aten|vlexport)\.([A-Za-z_]\w{0,127})\.([A-Za-z_]\w{0,127})")

_TYPES = frozenset({"Tensor", "int", "bool", "float", "number", "complex", "Device", "Generator", "str"})
_WRAPPED = re.compile(r"(?:List|Optional)\[(.+)\]")
_MODE_STRINGS = frozenset(
    {"approximate", "assert_msg", "driver", "equation", "indexing", "interpolation", "mode", "norm", "ord", "p"}
    | {"pad_mode", "padding", "padding_side", "reduce", "rounding_mode", "side", "UPLO"}
)
_WITHOUT_TENSORS = frozenset({"_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"})
# Leading underscores mark kernels that trust their caller; these are the ones that export itself writes.
_PRIVATE = frozenset(
    {"_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_assert_async", "_assert_scalar", "_assert_tensor_metadata"}
    | {"_convolution", "_convolution_mode", "_euclidean_dist", "_cdist_forward", "_local_scalar_dense"}
    | {"_log_softmax", "_softmax", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"}
    | {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention", "_safe_softmax"}
    | {"_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math", "_shape_as_tensor", "_stack"}
    | {"_to_copy", "_unique2", "_unsafe_index", "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa"}
    | {"_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_trilinear"}
    | {"_weight_norm", "_weight_norm_interface", "_fused_rms_norm", "_functional_assert_scalar", "_to_cpu"}
    | {"__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_embedding_bag", "_pdist_forward", "_reshape_copy"}
)


def refusal_of(target: str) -> str | None:
    """Why a node may not call ``target``, or None if it may."""
    module, _, name = target.rpartition(".")
    if module == "_operator" and name in OPERATOR_FUNCTIONS:
        return None
    if module == "math" and name in MATH_FUNCTIONS:
        return None
    if module == "torch" and name in SYMBOL_FUNCTIONS:
        return None
    if module == "torch.ops.higher_order" and name in HIGHER_ORDER:
        return None
    if target.startswith(_DECOMPOSED):
        declare_decomposed_operators()
        known = target.removeprefix(_DECOMPOSED) in decomposed.OPERATORS
        return None if known else "of quantized_decomposed it is none that becomes our own"
    match = _OVERLOAD.fullmatch(target)
    if match is None:
        return "it is no operator that a saved model may call"
    namespace, operator, overload_name = match.groups()
    signature = find_signature(namespace, operator, overload_name)
    if signature is None:
        return "no such operator is registered"
    if namespace == "vlexport":
        return None if operator in quant_ops.OPERATORS else "it is none of our own operators"
    return _refusal_of_aten(operator, *signature)


def _refusal_of_aten(operator: str, arguments: list[tuple[str, str]], returns: list[str]) -> str | None:
    if operator.startswith("_") and operator not in _PRIVATE:
        return "it is a private operator that exported models do not call"
    types = [*(kind for _, kind in arguments), *returns]
    if operator not in _WITHOUT_TENSORS and not any("Tensor" in kind for kind in types) and "sym_" not in operator:
        return "it does not compute on tensors"
    for name, kind in arguments:
        plain = _unwrapped(kind)
        if plain not in _TYPES:
            return f"its argument '{name}' is a {kind}"
        if plain == "str" and name not in _MODE_STRINGS:
            return f"its argument '{name}' is free text"
    return None


def _unwrapped(kind: str) -> str:
    while (match := _WRAPPED.fullmatch(kind)) is not None:
        kind = match.group(1)
    return kind
