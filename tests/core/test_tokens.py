"""--tokens as typed: methods, keys, and what is refused."""

from __future__ import annotations

import pytest

from vlexport.core.errors import UsageError
from vlexport.core.tokens import METHODS, flag_of, tokens_from_text


@pytest.mark.parametrize("name", METHODS)
def test_example_is_understood_when_it_is_given_back(name: str) -> None:
    request = tokens_from_text(METHODS[name].example)
    assert (request.method, request.pass_name) == (name, METHODS[name].pass_name)


def test_values_and_component_are_told_apart_when_both_are_given() -> None:
    request = tokens_from_text("evit:keep=0.7, layers=4+7+10,component=image")
    assert request.component == "image"
    assert request.values == {"method": "evit", "keep": "0.7", "layers": "4+7+10"}


def test_keys_of_freeze_are_left_to_its_pass_when_parsed() -> None:
    assert tokens_from_text("freeze:percentile=90").values == {"percentile": "90"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("evot:keep=0.7", "no token method 'evot'; did you mean 'evit'?"),
        ("", "no token method ''"),
        ("evit:kep=0.7", "--tokens evit has no key 'kep'; did you mean 'keep'?"),
        ("tome:keep=0.7", "--tokens tome has no key 'keep'"),
        ("evit:keep", "'keep' is not key=value"),
        ("evit:", "'' is not key=value"),
        ("evit:keep=", "'keep=' is not key=value"),
        ("evit:keep=0.7,keep=0.5", "keep is given twice"),
    ],
)
def test_text_is_refused_in_words_when_it_is_wrong(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        tokens_from_text(text)
    assert caught.value.code == "VLX0703"
    assert said in caught.value.message


def test_flag_is_named_when_a_pass_runs_on_request() -> None:
    assert flag_of("freeze-tokens") == "--tokens freeze"
    assert flag_of("fold-batch-norm") == ""
