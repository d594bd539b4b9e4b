"""Secure aggregation: exact sums, drop-outs, and what a single masked update gives away."""

import itertools

import mpmath
import numpy as np
import pytest
import sympy
import torch
from scipy import stats

from gidef.defence import secure_sum
from gidef.defence.secure_sum import FIELD, GROUP, SecureClient, SecureSum, mask, restore_secret, share_secret
from gidef.errors import InputError
from gidef.types import Client, Update
from gidef.updates import FixedPointSum, mean_over


def values_of(cohort, length=300, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(-(2**58), 2**58, (length,), generator=draw) for _ in range(cohort)]


def sent_by(secure, values, members):
    return {number: secure.clients[number].masked(values[number]) for number in members}


def exact(values, members):
    """Python's integers, which never wrap."""
    return [sum(int(values[number][place]) for number in members) for place in range(len(values[0]))]


# --- the sum -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", [2, 3, 7])
def test_the_sum_is_exact_when_all_arrive(cohort):
    secure, values = SecureSum(cohort=cohort, seed=1, round=2), values_of(cohort)
    before = [v.clone() for v in values]
    assert secure.total(sent_by(secure, values, range(cohort))).tolist() == exact(values, range(cohort))
    assert all(v.equal(b) for v, b in zip(values, before, strict=True))


@pytest.mark.parametrize("gone", [(0,), (9,), (4,), (0, 1, 2), (7, 8, 9), (0, 5, 9)])
def test_the_sum_of_who_stayed_survives_three_of_ten_that_drop_out(gone):
    secure, values = SecureSum(cohort=10, seed=0, round=0), values_of(10)
    stayed = [number for number in range(10) if number not in gone]
    assert secure.total(sent_by(secure, values, stayed)).tolist() == exact(values, stayed)


def test_every_group_from_the_threshold_on_has_its_sum():
    values = values_of(4, length=5)
    for members in [*itertools.combinations(range(4), 3), range(4)]:
        secure = SecureSum(cohort=4, seed=0, round=0)
        assert secure.threshold == 3 and secure.total(sent_by(secure, values, members)).tolist() == exact(values, members)


def test_the_mean_of_updates_has_the_bits_of_the_open_one():
    draw = torch.Generator().manual_seed(3)
    template = {"w": torch.zeros(4, 5), "b": torch.zeros(3)}
    updates = [Update({n: torch.randn(t.shape, generator=draw) for n, t in template.items()}, weight, {"loss": 0.1 * weight}) for weight in (3, 11, 7, 2)]
    clients = [Client(k, torch.zeros(0), torch.zeros(0)) for k in range(4)]
    for stayed in ((0, 1, 2, 3), (0, 1, 3)):
        opened = mean_over(lambda client, worker: updates[client.id], [clients[k] for k in stayed], template=template, metric_names=("loss",))
        secure, sent = SecureSum(cohort=4, seed=0, round=0), {}
        for number in stayed:
            own = FixedPointSum(template, metric_names=("loss",), max_terms=4)
            own.add(updates[number].delta, updates[number].num_examples, updates[number].metrics)
            sent[number] = secure.clients[number].masked(own.buffer)
        summed = FixedPointSum(template, metric_names=("loss",), max_terms=4)
        summed.buffer.copy_(secure.total(sent))
        mean, weight, metrics = summed.mean()
        assert weight == opened.num_examples and metrics == opened.metrics and summed.count == len(stayed)
        assert all(mean[name].equal(opened.delta[name]) for name in template)


# --- what the server sees ------------------------------------------------------------------------------------------------


def test_a_masked_update_is_uniform_whatever_it_holds():
    length = 40_000
    secure = SecureSum(cohort=3, seed=0, round=0)
    for values in (torch.zeros(length, dtype=torch.int64), torch.full((length,), -(2**61)), torch.arange(length) * 2**40):
        seen = secure.clients[1].masked(values).numpy().view(np.uint64)
        for byte in range(8):
            counts = np.bincount((seen >> np.uint64(8 * byte)).astype(np.uint8), minlength=256)
            assert stats.chisquare(counts).pvalue > 1e-4
        assert abs(np.corrcoef(seen.astype(float)[1:], seen.astype(float)[:-1])[0, 1]) < 5 / length**0.5


def test_two_updates_look_alike_over_rounds():
    """The same entry of very different updates, over rounds: one distribution."""
    small, large = torch.zeros(16, dtype=torch.int64), torch.full((16,), 2**60)

    def seen(values, seed):
        clients = (SecureClient(0, cohort=2, threshold=2, secret=secret) for secret in range(seed, seed + 80))
        found = []
        for number, client in enumerate(clients):
            client.receive({}, [client.public, pow(2, 12345 + number, GROUP)])
            found.append(client.masked(values))
        return torch.cat(found).double().numpy()

    assert stats.ks_2samp(seen(small, 0), seen(large, 1000)).pvalue > 1e-4


def test_the_own_mask_alone_hides_a_client_whose_partners_are_known():
    """A server that knows every pairwise seed, as after a wrong claim that a client dropped out, still lacks b."""
    secure, values = SecureSum(cohort=3, seed=0, round=0), torch.zeros(20_000, dtype=torch.int64)
    client = secure.clients[0]
    left = client.masked(values) - sum(mask(seed, len(values)) for seed in client._seeds.values())
    counts = np.bincount(left.numpy().view(np.uint8), minlength=256)
    assert left.equal(mask(client._own, len(values))) and stats.chisquare(counts).pvalue > 1e-4


def test_masks_repeat_with_seed_and_round_and_with_nothing_else():
    def seen(number=0, **stream):
        return SecureSum(cohort=3, **({"seed": 0, "round": 0} | stream)).clients[number].masked(torch.zeros(8, dtype=torch.int64))

    assert seen().equal(seen())
    assert not any(seen().equal(other) for other in (seen(seed=1), seen(round=1), seen(number=1)))


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stayed", [(), (0,), (0, 1, 2, 3, 4, 5)])
def test_below_the_threshold_nothing_is_revealed(stayed):
    secure, values = SecureSum(cohort=10, seed=0, round=0), values_of(10)
    with pytest.raises(InputError, match=f"{len(stayed)} .*arrived, 7 are needed"):
        secure.total(sent_by(secure, values, stayed))


def test_a_client_does_not_reveal_both_secrets_of_another():
    secure, values = SecureSum(cohort=10, seed=0, round=0), values_of(10)
    sent = sent_by(secure, values, range(10))
    assert secure.total(sent).equal(secure.total(sent))
    with pytest.raises(InputError, match="both together would unmask"):
        secure.total({number: y for number, y in sent.items() if number != 3})


def test_cohorts_thresholds_and_values_out_of_range_are_refused():
    for options, said in (({"cohort": 1}, "cohort=1"), ({"cohort": 6, "threshold": 3}, "from 4 to 6"), ({"cohort": 6, "threshold": 7}, "from 4 to 6")):
        with pytest.raises(InputError, match=said):
            SecureSum(seed=0, round=0, **options)
    secure = SecureSum(cohort=2, seed=0, round=0)
    with pytest.raises(ValueError, match="int64"):
        secure.clients[0].masked(torch.zeros(3))
    with pytest.raises(ValueError, match="one length"):
        secure.total({number: client.masked(torch.zeros(3 + number, dtype=torch.int64)) for number, client in enumerate(secure.clients)})


# --- shares and keys -----------------------------------------------------------------------------------------------------


def test_any_threshold_of_shares_restores_the_secret_and_one_less_does_not():
    secret = 2**255 + 12345
    shares = share_secret(secret, [0, 3, 4, 9, 11], threshold=3, randomness="r")
    for size in (3, 4, 5):
        for some in itertools.combinations(shares, size):
            assert restore_secret({holder: shares[holder] for holder in some}, threshold=3) == secret
    with pytest.raises(InputError, match="2 shares .* takes 3"):
        restore_secret({holder: shares[holder] for holder in (0, 3)}, threshold=3)
    assert restore_secret({holder: shares[holder] for holder in (0, 3)}, threshold=2) != secret


def test_shares_below_the_threshold_are_uniform_whatever_the_secret():
    for secret in (0, FIELD - 1):
        pairs = [share_secret(secret, [0, 1, 2], threshold=3, randomness=str(number)) for number in range(4000)]
        cells = [4 * (pair[0] * 4 // FIELD) + pair[2] * 4 // FIELD for pair in pairs]
        assert stats.chisquare(np.bincount(cells, minlength=16)).pvalue > 1e-4


def test_the_field_and_the_group_are_what_they_are_said_to_be():
    assert sympy.isprime(FIELD) and sympy.isprime(GROUP) and sympy.isprime((GROUP - 1) // 2) and GROUP.bit_length() == 2048
    with mpmath.workprec(2200):
        pi = int(mpmath.floor(mpmath.mpf(2) ** 1918 * mpmath.pi))
    assert 2**2048 - 2**1984 - 1 + 2**64 * (pi + 124476) == GROUP  # RFC 3526, section 3
    a, b = 2**200 + 1, 2**201 + 7
    assert secure_sum._agreed(a, pow(2, b, GROUP)) == secure_sum._agreed(b, pow(2, a, GROUP)) != secure_sum._agreed(a, pow(2, b + 1, GROUP))
