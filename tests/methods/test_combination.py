"""Several methods at once: names, weights, disagreements."""

from functools import partial

import pytest
import torch
from torch import nn

from drkd.contracts import DetectorOutput, DetectorSpec, DrkdError, FeatureLevel, KDMethod
from drkd.methods import CWD, DRKD, FGFI, PKD, Combination

SPEC = DetectorSpec((FeatureLevel("p3", 8, 8.0), FeatureLevel("p4", 8, 16.0)), ("thing",))


class Constant(KDMethod):
    """One term of a given value, which needs what it is told."""

    def __init__(self, student, teacher, *, value=1.0, needs=("features",), balanced=True):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.needs = frozenset(needs)
        self.weights = {"term": 2.0}
        self.minimum_boxes = {"term": 3}
        self.balanced = balanced
        self.warmup_steps = 0

    def forward(self, student, teacher, batch):
        return {"term/p3": self.value}


def test_terms_keep_their_values_and_get_their_members_names():
    methods = {"a": partial(Constant, value=3.0), "b": partial(Constant, value=4.0)}
    terms = Combination(SPEC, SPEC, methods=methods)(DetectorOutput(), DetectorOutput(), None)
    assert {name: term.item() for name, term in terms.items()} == {"a.term/p3": 3.0, "b.term/p3": 4.0}


def test_a_method_is_used_as_it_is():
    own = Constant(SPEC, SPEC, value=3.0)
    kd = Combination(SPEC, SPEC, methods={"a": own, "b": partial(Constant, value=4.0)}, factors={"a": 0.5})
    terms = kd(DetectorOutput(), DetectorOutput(), None)
    assert {name: term.item() for name, term in terms.items()} == {"a.term/p3": 3.0, "b.term/p3": 4.0}
    assert kd.members["a"] is own and kd.weights == {"a.term": 1.0, "b.term": 2.0}
    assert any(parameter is own.value for parameter in kd.parameters())


def test_a_member_of_factor_0_is_neither_built_nor_computed():
    def never(student, teacher):
        raise AssertionError("was built")

    methods = {"a": never, "b": partial(Constant, value=4.0), "c": Constant(SPEC, SPEC, needs=("losses",))}
    kd = Combination(SPEC, SPEC, methods=methods, factors={"a": 0.0, "c": 0})
    assert list(kd.members) == ["b"] and kd.weights == {"b.term": 2.0} and kd.needs == {"features"}
    assert list(kd(DetectorOutput(), DetectorOutput(), None)) == ["b.term/p3"]


def test_declarations_are_the_members_together():
    methods = {"a": Constant, "b": partial(Constant, needs=("losses",))}
    kd = Combination(SPEC, SPEC, methods=methods, factors={"b": 0.25})
    assert kd.weights == {"a.term": 2.0, "b.term": 0.5}
    assert kd.minimum_boxes == {"a.term": 3, "b.term": 3}
    assert kd.needs == {"features", "losses"}
    assert KDMethod.needs == {"features"}
    assert len(list(kd.parameters())) == 2


def test_real_members():
    methods = {"relations": DRKD, "anchors": FGFI, "channels": partial(CWD, weight=0.5)}
    kd = Combination(SPEC, SPEC, methods=methods, factors={"relations": 2.0})
    assert kd.weights == {
        "relations.pixel_relation": 6.0,
        "relations.instance_relation": 0.2,
        "relations.instance": 1.0,
        "anchors.fgfi": 1.0,
        "channels.cwd": 0.5,
    }
    assert kd.minimum_boxes == {"relations.instance_relation": 2, "relations.instance": 1, "anchors.fgfi": 1}
    assert kd.balanced and kd.warmup_steps == 0


def test_combinations_nest():
    inner = partial(Combination, methods={"x": PKD}, factors={"x": 0.5})
    kd = Combination(SPEC, SPEC, methods={"a": inner, "b": inner}, factors={"b": 0.5})
    assert kd.weights == {"a.x.pkd": 0.5, "b.x.pkd": 0.25}


def test_balanced_must_agree():
    with pytest.raises(DrkdError, match="agree on `balanced`, got a: True, b: False"):
        Combination(SPEC, SPEC, methods={"a": PKD, "b": partial(PKD, balanced=False)})
    kd = Combination(SPEC, SPEC, methods={"a": partial(CWD, balanced=False), "b": partial(PKD, balanced=False)})
    assert not kd.balanced and kd.weights == {"a.cwd": 10.0, "b.pkd": 10.0}


def test_warmup_must_agree_or_be_given():
    methods = {"a": PKD, "b": partial(PKD, warmup_steps=5)}
    with pytest.raises(DrkdError, match="agree on `warmup_steps`, got a: 0, b: 5"):
        Combination(SPEC, SPEC, methods=methods)
    assert Combination(SPEC, SPEC, methods=methods, warmup_steps=9).warmup_steps == 9
    assert Combination(SPEC, SPEC, methods={"b": methods["b"]}).warmup_steps == 5


def test_decay_must_agree_or_be_given():
    methods = {"a": PKD, "b": partial(PKD, decay="cosine")}
    with pytest.raises(DrkdError, match="agree on `decay`, got a: none, b: cosine"):
        Combination(SPEC, SPEC, methods=methods)
    assert Combination(SPEC, SPEC, methods=methods, decay="none").decay == "none"
    assert Combination(SPEC, SPEC, methods={"b": methods["b"]}).schedule(1, 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": {}}, "no methods"),
        ({"methods": {"a.b": PKD}}, "'a.b'"),
        ({"methods": {"a/b": PKD}}, "'a/b'"),
        ({"methods": {"a": PKD}, "factors": {"b": 1.0}}, "factors for b, but its methods are a"),
        ({"methods": {"a": PKD}, "factors": {"a": -1.0}}, "at least 0"),
        ({"methods": {"a": PKD}, "factors": {"a": float("nan")}}, "at least 0"),
        ({"methods": {"a": PKD, "b": CWD}, "factors": {"a": 0, "b": 0.0}}, "above 0, got {'a': 0, 'b': 0.0} for a, b"),
    ],
)
def test_what_cannot_be_used(options, message):
    with pytest.raises(DrkdError, match=message):
        Combination(SPEC, SPEC, **options)
