"""Functions and classes of torch in an opened forward that don't take proxies."""

from __future__ import annotations

from typing import Any, Dict, List, Optional  # noqa: UP035  (as code for TorchScript writes them)

import pytest
import torch
import torch.distributions as D
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence as pack

import fxcollab
from fxcollab import CaptureError
from tests.tracing.question_helpers import MORE, NOTES, Net, X, agrees, made, proven


class RefinesTypes(Net):
    def forward(self, x: Tensor) -> Any:
        pair = self.a(x), x
        h = pair[0]
        if torch.jit.isinstance(h, Tensor):
            h = h + 1
        if torch.jit.isinstance(h, List[Tensor]) or torch.jit.isinstance(h, Dict[str, Tensor]):  # noqa: UP006
            h = h * 0
        if torch.jit.isinstance([h, x], List[Tensor]) and torch.jit.isinstance(h, Optional[Tensor]):  # noqa: UP006, UP045
            h = h * 2
        return self.tail(h)


class TakesAList(Net):
    def forward(self, xs: Any) -> Any:
        h = self.a(xs[0])
        if torch.jit.isinstance(xs, List[Tensor]):  # noqa: UP006
            h = h + xs[1]
        return self.tail(h)


def test_torch_jit_isinstance_is_answered_as_isinstance() -> None:
    for model, given in ((RefinesTypes(), X), (TakesAList(), [X, X + 1])):
        assert agrees(made(model, (given,)), model, given)


class AsTensor(Net):
    function: Any = staticmethod(torch.as_tensor)

    def forward(self, x: Tensor) -> Any:
        h = self.function(self.a(self.function(x)), dtype=torch.float32)
        with torch.no_grad():
            kept = self.function(h)  # the same tensor, with its gradient
        return self.tail(h * self.function([x.shape[0], 2.0])[1] + kept)


@pytest.mark.parametrize("function", [torch.as_tensor, torch.asarray])
def test_as_tensor_and_asarray_are_recorded(function: Any) -> None:
    model = AsTensor()
    model.function = function
    assert agrees(proven(model), model, MORE)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lstm = nn.Embedding(20, 6), nn.LSTM(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def pack(self, h: Tensor, lengths: Tensor) -> Any:
        return pack(h, lengths.cpu(), batch_first=True, enforce_sorted=False)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Any:
        h, _ = self.lstm(self.pack(self.emb(tokens), lengths))
        h, lengths = rnn.pad_packed_sequence(h, batch_first=True)
        return self.fc(h.sum(1) / lengths[:, None])


class PackedByItsModule(Packed):
    def pack(self, h: Tensor, lengths: Tensor) -> Any:
        return nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)


@pytest.mark.parametrize("make", [Packed, PackedByItsModule])
def test_packed_sequences_are_packed_at_every_call(make: type[Packed]) -> None:
    model = make()
    given = torch.randint(0, 20, (3, 5)), torch.tensor([5, 2, 3])
    train_model = made(model, given, ["emb"])
    assert agrees(train_model, model, torch.randint(0, 20, (4, 7)), torch.tensor([1, 7, 4, 7]))
    assert not [note for note in train_model.meta[NOTES] if "one node" in note]
    assert pack is rnn.pack_padded_sequence is nn.utils.rnn.pack_padded_sequence


class Samples(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        posterior = Normal(h, self.b(x).exp())
        prior = torch.distributions.Normal(torch.zeros_like(h), torch.ones_like(h))
        assert isinstance(posterior, Normal) and not isinstance(x, Normal)
        z = D.Independent(posterior, 1).rsample()
        return self.d(self.c(z)), kl_divergence(posterior, prior).sum(), posterior.log_prob(z.detach())


@pytest.mark.parametrize("validate", [True, False])  # some libraries switch it off for the whole process
def test_distributions_are_made_at_every_call(validate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(D.Distribution, "_validate_args", validate)
    model, normal = Samples(), Normal
    train_model = made(model, (X,), ["a"])
    assert Normal is normal is D.Normal and type(Normal) is type
    torch.manual_seed(0)
    (one, *_), (other, *_) = train_model(MORE)
    torch.manual_seed(0)
    assert torch.equal(one, model(MORE)[0])
    assert not torch.equal(one, other)


class MovingAverage(Net):
    """A key network that follows the query network, written by ``.data``."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            for mine, other in zip(self.c.parameters(), self.b.parameters(), strict=True):
                mine.data = mine.data * 0.9 + other.data * 0.1
        h = self.a(x)
        return self.d(self.b(h) - self.c(h).detach())


class MovingAverageInPlace(MovingAverage):
    def forward(self, x: Tensor) -> Any:
        for mine, other in zip(self.c.parameters(), self.b.parameters(), strict=True):
            mine.data.mul_(0.9).add_(other.data, alpha=0.1)
        h = self.a(x)
        return self.d(self.b(h) - self.c(h).detach())


class MovingAverageByName(MovingAverage):
    def forward(self, x: Tensor) -> Any:
        self.c.weight.data = self.c.weight.data * 0.9 + self.b.weight.data * 0.1
        h = self.a(x)
        return self.d(self.b(h) - self.c(h).detach())


@pytest.mark.parametrize("make", [MovingAverage, MovingAverageInPlace, MovingAverageByName])
@pytest.mark.parametrize("split", ["a", "b"])
def test_an_average_of_weights_that_a_forward_writes_by_data_is_written_at_every_call(
    make: type[Net], split: str
) -> None:
    torch.manual_seed(0)
    model = make()
    twin = make()
    twin.load_state_dict(model.state_dict())
    before = model.c.weight.clone()
    train_model = made(model, (X,), [split])
    assert torch.equal(model.c.weight, before)
    for _ in range(2):
        assert torch.equal(train_model(X)[0], twin(X))
    assert torch.equal(model.c.weight, twin.c.weight) and not torch.equal(model.c.weight, before)


class Halves(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.tail(self.a(x))
        self.a.weight.data = self.a.weight.data[:4]
        return h


def test_data_of_another_shape_is_refused_where_it_is_assigned() -> None:
    with pytest.raises(CaptureError, match="assigned to the data"):
        made(Halves(), (X,))


class TriesKeywords(Net):
    """As in speechbrain."""

    def forward(self, x: Tensor, lengths: Any = None) -> Any:
        for layer in (self.a, self.b, self.c, self.d):
            try:
                x = layer(x, lengths=lengths)
            except TypeError:
                x = layer(x)
        return x


class Scaled(nn.Linear):
    def forward(self, x: Tensor, *factors: float, **named: float) -> Tensor:
        for factor in (*factors, *named.values()):
            x = x * factor
        return super().forward(x)


class TriesMore(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = Scaled(8, 8), torch.jit.script(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Any:
        try:
            x = self.b(x, 2.0)
        except TypeError:
            x = self.a(x, 2.0, lengths=0.5)
        try:
            return self.d(self.b())
        except TypeError:
            return self.tail(x)


def test_a_call_that_the_signature_refuses_raises_as_in_the_original() -> None:
    for model in (TriesKeywords(), TriesMore()):
        train_model = made(model, (X,))
        assert agrees(train_model, model, MORE)


class AddsAnArgument(Net):
    """A hook completes the arguments, so that the signature alone doesn't tell."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Bilinear(8, 8, 8)  # type: ignore[assignment]
        self.c.register_forward_pre_hook(lambda _, inputs: inputs * 2)

    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(self.b(self.a(x))))


def test_arguments_that_a_hook_adds_are_not_missed() -> None:
    model = AddsAnArgument()
    assert agrees(fxcollab.transform(model, "simple", ["b"], example_inputs=(X,)), model, MORE)
