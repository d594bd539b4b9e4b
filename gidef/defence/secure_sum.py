"""Secure aggregation, simulated: the server learns a cohort's sum and no client's update.

    y_u = x_u + G(b_u) + Σ_{v > u} G(s_uv) − Σ_{v < u} G(s_uv)   (mod 2^64)

b_u: a seed of client u's own.  s_uv = s_vu: a seed that u and v agree on by Diffie–Hellman.  G: 64-bit integers from a seed. In the sum over a
cohort the pairwise masks cancel. Seeds b_u and keys are cut into Shamir shares among the cohort, t of which restore one: of a client whose y_u
arrived the server collects shares of b_u, and takes G(b_u) away; of one that dropped out after the others had masked their updates against it,
shares of its key, and takes away what is left of its pairwise masks. Never both of one client: the others refuse.

x_u are the integers of `updates.FixedPointSum`, such as its `buffer`: so the sum is exact, bit for bit that of the open one, as long as it lies
within ±2^63, which `FixedPointSum` sees to.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", ACM CCS, Figure 4, against a server that
is honest but curious.
Deviates: one process plays everybody; shares are handed over in the open, neither encrypted nor signed; and keys are functions of the run's
seed, so that runs can be repeated: whoever knows that seed can unmask everything.
What an attacker sees is then the sum of the cohort, as of one client that holds everybody's batches.
Broken by: a server that sends what makes an update carry single images whatever it is added to, such as an imprint layer (Fowl et al. 2022,
arXiv:2110.13057; Zhao et al. 2024, arXiv:2303.12233), which A11 reads off the sum; or a different model to every client (Pasquini et al. 2022,
arXiv:2111.07380), which is not simulated here. Against an honest server it is a larger batch, no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gidef.errors import InputError
from gidef.rng import generator, stream_seed
from gidef.types import Tensors
from gidef.updates import FixedPointSum

FIELD = 2**521 - 1
"""A prime: secrets of 256 bits are shared modulo it."""
GROUP = int(
    "FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DDEF9519B3CD3A431B302B0A6DF25F1437"
    "4FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7EDEE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF05"
    "98DA48361C55D39A69163FA8FD24CF5F83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B"
    "E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA051015728E5A8AACAA68FFFFFFFFFFFFFFFF",
    16,
)
"""A safe prime, with generator 2: group 14 of RFC 3526, 2048 bits."""


def share_secret(secret: int, holders: Sequence[int], *, threshold: int, randomness: str) -> dict[int, int]:
    """Shamir's shares: holder h gets f(h + 1), f a random polynomial of degree t − 1 with f(0) = secret, modulo FIELD.

    Args:    secret: in [0, FIELD).  holders: distinct numbers from 0.  threshold: t, from 1 to their number. Fewer than t shares are
             uniform, whatever the secret.  randomness: what the coefficients are hashed from; the owner's secret too.
    Raises:  ValueError if one is out of range.
    Source:  Shamir 1979, "How to share a secret", CACM 22.
    """
    if not 0 <= secret < FIELD or len(set(holders)) != len(holders) or not 1 <= threshold <= len(holders):
        raise ValueError(f"threshold {threshold} of {len(holders)} holders: expected distinct holders, a threshold among them, and a secret in the field")
    coefficients = [secret, *(_hashed(randomness, degree, size=80) % FIELD for degree in range(1, threshold))]
    shares = {}
    for holder in holders:
        value = 0
        for coefficient in reversed(coefficients):  # Horner's rule
            value = (value * (holder + 1) + coefficient) % FIELD
        shares[holder] = value
    return shares


def restore_secret(shares: Mapping[int, int], *, threshold: int) -> int:
    """f(0) of `share_secret` from t of its shares, holder → share, by Lagrange's interpolation.

    Raises: InputError for fewer than t.
    """
    if len(shares) < threshold:
        raise InputError(f"{len(shares)} shares do not restore a secret that takes {threshold}: lower the threshold, or let fewer clients drop out.")
    points = [(holder + 1, share) for holder, share in sorted(shares.items())[:threshold]]
    secret = 0
    for x, share in points:
        above, below = 1, 1
        for other, _ in points:
            if other != x:
                above, below = above * other % FIELD, below * (other - x) % FIELD
        secret += share * above * pow(below, -1, FIELD)
    return secret % FIELD


def mask(seed: int, length: int) -> Tensor:
    """G: `length` integers from a 256-bit seed, int64, all 2^64 equally likely: SHAKE-128 of the seed."""
    stream = hashlib.shake_128(seed.to_bytes(32, "little")).digest(8 * length)
    return torch.from_numpy(np.frombuffer(stream, dtype="<i8").astype(np.int64))


@dataclass(frozen=True, slots=True)
class Shares:
    """One member's shares of another's secrets: of the seed of its own mask, and of its key."""

    own: int
    key: int


class SecureClient:
    """A member of a cohort.

    Args:    number: from 0 to cohort − 1.  threshold: t.  secret: its randomness, unknown to all others.
    """

    def __init__(self, number: int, *, cohort: int, threshold: int, secret: int) -> None:
        self.number, self._cohort, self._threshold, self._secret = number, cohort, threshold, secret
        self._own, self._key = _hashed(secret, "own"), _hashed(secret, "key")
        self.public = pow(2, self._key, GROUP)
        self._held: dict[int, Shares] = {}
        self._seeds: dict[int, int] = {}
        self._told: dict[int, str] = {}

    def deal(self) -> dict[int, Shares]:
        """Shares of its secrets, one for every member, itself included."""
        own, key = (
            share_secret(secret, range(self._cohort), threshold=self._threshold, randomness=f"{self._secret} {name}")
            for name, secret in (("own", self._own), ("key", self._key))
        )
        return {holder: Shares(own[holder], key[holder]) for holder in own}

    def receive(self, held: Mapping[int, Shares], public: Sequence[int]) -> None:
        """Take its shares of every member's secrets, and the public keys in the order of members."""
        self._held = dict(held)
        self._seeds = {other: _agreed(self._key, key) for other, key in enumerate(public) if other != self.number}

    def masked(self, values: Tensor) -> Tensor:
        """y of int64 values (n,), on their device; uniform to all who lack one of its seeds. The input is not modified.

        One update a round: two under the same masks give their difference away.
        """
        if values.dtype != torch.int64 or values.ndim != 1:
            raise ValueError(f"{values.dtype} {tuple(values.shape)}: masks are for int64 (n,)")
        total = values.cpu() + mask(self._own, len(values))
        for other, seed in self._seeds.items():
            total += _sign(self.number, other) * mask(seed, len(values))
        return total.to(values.device)

    def reveal(self, arrived: Collection[int]) -> dict[int, int]:
        """Its share of one secret of every member: of the own seed where the update arrived, of the key where it did not.

        Raises: InputError if fewer than the threshold arrived, or if a share of a member's other secret was revealed before.
        """
        if len(set(arrived)) < self._threshold:
            raise InputError(
                f"{len(set(arrived))} of {self._cohort} masked updates arrived, {self._threshold} are needed: nothing is revealed. "
                "Repeat the round, or lower the threshold."
            )
        kinds = {member: "own" if member in arrived else "key" for member in self._held}
        if any(self._told.get(member, kind) != kind for member, kind in kinds.items()):
            raise InputError(f"client {self.number} has revealed a share of another secret of a member: both together would unmask its update. Ask once a round.")
        self._told = kinds
        return {member: getattr(self._held[member], kind) for member, kind in kinds.items()}


class SecureSum:
    """One round over a cohort, numbered from 0; also the server, and the exchange of keys and shares before it.

        secure = SecureSum(cohort=10, seed=0, round=3)
        sent = {number: secure.clients[number].masked(values[number]) for number in those_that_stayed}
        total = secure.total(sent)                                             # Σ of their values, int64 (n,)

    Args:    cohort: clients, at least 2.  seed, round: all that is random is a function of them.
             threshold: t, how many have to stay: above half of the cohort, so that no two separate groups can restore both secrets of a client.
             None takes ⌊2 cohort / 3⌋ + 1, at most the cohort; three of ten may then drop out.
    Raises:  InputError if one is out of range.
    """

    def __init__(self, *, cohort: int, seed: int, round: int, threshold: int | None = None) -> None:
        if cohort < 2:
            raise InputError(f"cohort={cohort}: a sum hides a client among others. Give at least 2.")
        self.threshold = min(cohort, 2 * cohort // 3 + 1) if threshold is None else threshold
        if not cohort // 2 < self.threshold <= cohort:
            raise InputError(f"threshold={threshold} for a cohort of {cohort}: give one from {cohort // 2 + 1} to {cohort}.")
        secrets = [stream_seed(seed, "secure-sum", round, number) for number in range(cohort)]
        self.clients = [SecureClient(number, cohort=cohort, threshold=self.threshold, secret=secret) for number, secret in enumerate(secrets)]
        self._public, dealt = [client.public for client in self.clients], [client.deal() for client in self.clients]
        for client in self.clients:
            client.receive({owner: shares[client.number] for owner, shares in enumerate(dealt)}, self._public)

    def total(self, sent: Mapping[int, Tensor]) -> Tensor:
        """The sum of what the clients in `sent` masked, number → y; the others have dropped out. int64 (n,), on the device of the first.

        Raises: InputError if fewer than the threshold arrived, or at a second call with others; ValueError for lengths that differ.
        """
        arrived = sorted(sent)
        revealed = {number: self.clients[number].reveal(arrived) for number in arrived}
        if not revealed:
            raise InputError(f"0 masked updates arrived, {self.threshold} are needed. Repeat the round.")
        lengths = {len(values) for values in sent.values()}
        if len(lengths) != 1:
            raise ValueError(f"masked updates of {sorted(lengths)} values: expected one length")
        return self._unmasked(sum(sent[number].cpu() for number in arrived), revealed).to(sent[arrived[0]].device)

    def unmask(self, total: Tensor, arrived: Collection[int]) -> Tensor:
        """As `total`, from the sum of what arrived and who sent it."""
        return self._unmasked(total.cpu().clone(), {number: self.clients[number].reveal(arrived) for number in sorted(arrived)}).to(total.device)

    def _unmasked(self, total: Tensor, revealed: Mapping[int, Mapping[int, int]]) -> Tensor:
        """Take the masks off a sum, in place. revealed: by each client that stayed, its shares."""
        length = len(total)
        for member, client in enumerate(self.clients):
            secret = restore_secret({number: shares[member] for number, shares in revealed.items()}, threshold=self.threshold)
            if member in revealed:
                total -= mask(secret, length)
                continue
            for number in revealed:  # the masks against a client that is not in the sum
                total -= _sign(number, client.number) * mask(_agreed(secret, self._public[number]), length)
        return total


class MaskedSum(FixedPointSum):
    """The cohort's sum as the server gets it: every client masks its integers before they are added, and `mean` takes the masks off the sum.

    Bit for bit the mean of the open sum of the same updates. Adding up over ranks and threads works as in the open one.

    Args:    members: ids of the clients that agreed on masks.  stayed: of those whose updates will arrive.  seed, round: of the masks; the rest as
             `FixedPointSum`.
    Raises:  InputError if fewer than the threshold stayed.
    """

    def __init__(self, template: Tensors, *, members: Sequence[int], stayed: Sequence[int], seed: int, round: int, **options: Any) -> None:
        super().__init__(template, **options)
        self._secure = SecureSum(cohort=len(members), seed=seed, round=round)
        self._places = {member: place for place, member in enumerate(members)}
        self._stayed, self._masked = [self._places[member] for member in stayed], True

    def add(self, delta: Tensors, weight: int, metrics: Mapping[str, float], *, client: int) -> None:
        terms = self._secure.clients[self._places[client]].masked(self._encode(delta, weight, metrics, client))
        with self._lock:
            self.buffer[: terms.numel()].add_(terms)
            self._mark_written()

    def mean(self, own: Tensors | None = None) -> tuple[Tensors, int, dict[str, float]]:
        if self._masked:
            terms = self.buffer[: len(self.buffer) - len(self.counters)]
            terms.copy_(self._secure.unmask(terms, self._stayed))
            self._masked = False
        return super().mean(own)


@dataclass(frozen=True, slots=True)
class SecureCohorts:
    """Who stays in a round, and the sum over them.

    dropouts: share of a cohort that drops out after masks were agreed, rounded down; drawn from (seed, round).
    """

    dropouts: float
    seed: int

    def stayed(self, cohort: Sequence[int], round: int) -> list[int]:
        """Client numbers, ascending."""
        order = torch.randperm(len(cohort), generator=generator(self.seed, "dropouts", round))
        return sorted(cohort[place] for place in order[int(self.dropouts * len(cohort)) :].tolist())

    def sum_of(self, cohort: Sequence[int], stayed: Sequence[int], round: int) -> Callable[..., MaskedSum]:
        """In the place of `FixedPointSum`."""
        return partial(MaskedSum, members=cohort, stayed=stayed, seed=self.seed, round=round)


def _agreed(key: int, public: int) -> int:
    """The seed that the owner of a key shares with the owner of a public one."""
    return _hashed(pow(public, key, GROUP))


def _sign(number: int, other: int) -> int:
    return 1 if number < other else -1


def _hashed(*parts: int | str, size: int = 32) -> int:
    """An integer of `size` bytes."""
    return int.from_bytes(hashlib.shake_256("\x1f".join(map(str, parts)).encode()).digest(size), "little")
