import pytest
import torch

from gidef.metrics import (
    accuracy,
    attacker_accuracy,
    attacker_correct,
    auc,
    correct,
    label_recovery,
    macro_f1,
    per_class_accuracy,
)


def logits_for(predictions, classes):
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def test_perfect_and_wrong_answers_score_one_and_zero():
    labels = torch.tensor([0, 1, 2, 1])
    right, wrong = logits_for([0, 1, 2, 1], 3), logits_for([1, 2, 0, 0], 3)
    for score in (accuracy, macro_f1):
        assert score(right, labels) == 1 and score(wrong, labels) == 0
    assert auc(right, labels) == 1
    assert correct(right, labels).tolist() == [1, 1, 1, 1]


def test_absent_classes_are_left_out_of_f1_and_auc_but_false_alarms_count():
    labels = torch.tensor([0, 0, 1, 1])
    assert macro_f1(logits_for([0, 0, 1, 1], 5), labels) == 1  # classes 2 to 4 occur nowhere
    assert macro_f1(logits_for([0, 0, 1, 4], 5), labels) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert auc(torch.tensor([[3.0, 1, 0], [2, 1, 0], [1, 2, 0], [1, 3, 0]]), labels) == 1


def test_per_class_accuracy_is_nan_where_nothing_can_be_said():
    scores = per_class_accuracy(logits_for([0, 1, 1, 0], 3), torch.tensor([0, 0, 1, 1]))
    assert scores[:2] == [0.5, 0.5] and scores[2] != scores[2]


def test_auc_of_constant_scores_is_chance_and_of_two_classes_the_binary_one():
    labels = torch.tensor([0, 1, 1, 0, 1])
    assert auc(torch.zeros(5, 2), labels) == 0.5
    score = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.9])
    pairs = [(p > n) + 0.5 * (p == n) for p in score[labels == 1] for n in score[labels == 0]]
    assert auc(torch.stack([-score, score], 1), labels) == pytest.approx(sum(map(float, pairs)) / 6)


def test_auc_needs_two_classes_and_ranks_confident_answers_apart():
    with pytest.raises(ValueError, match="only one class"):
        auc(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    # after softmax in float32 both would be exactly 1
    logits = torch.tensor([[30.0, 0.0], [20.0, 0.0]])
    assert auc(logits, torch.tensor([0, 1])) == 1


def test_the_judge_sees_clamped_batches_without_gradient():
    seen = []

    def judge(batch):
        seen.append((len(batch), float(batch.min()), float(batch.max()), torch.is_grad_enabled()))
        return torch.stack([1 - batch.mean((1, 2, 3)), batch.mean((1, 2, 3))], 1)

    images = torch.stack([torch.full((1, 2, 2), level) for level in (-3.0, 0.2, 0.9, 5.0, 0.7)])
    labels = torch.tensor([0, 1, 1, 1, 0])
    assert attacker_correct(judge, images, labels, batch_size=2).tolist() == [1, 0, 1, 1, 0]
    assert attacker_accuracy(judge, images, labels) == pytest.approx(0.6)
    assert [count for count, *_ in seen] == [2, 2, 1, 5]
    assert all(low >= 0 and high <= 1 and not gradient for _, low, high, gradient in seen)


def test_label_recovery_counts_repeated_labels_once_each():
    truth = torch.tensor([0, 0, 1, 4])
    assert label_recovery(torch.tensor([4, 0, 1, 0]), truth) == 1
    assert label_recovery(torch.tensor([0, 0, 0, 0]), truth) == 0.5
    assert label_recovery(torch.tensor([2, 3, 9, 9]), truth) == 0
    with pytest.raises(ValueError, match="two"):
        label_recovery(truth[:2], truth)


def test_bad_arguments_are_refused():
    labels = torch.tensor([0, 1])
    for score in (accuracy, macro_f1, auc, per_class_accuracy):
        with pytest.raises(ValueError, match="diverged"):
            score(torch.full((2, 2), torch.nan), labels)
        with pytest.raises(ValueError, match="labels reach from 0 to 1, logits have 1"):
            score(torch.zeros(2, 1), labels)
        with pytest.raises(ValueError, match="expected logits"):
            score(torch.zeros(3, 2), labels)
        with pytest.raises(ValueError, match="expected logits"):
            score(torch.zeros(0, 2), labels[:0])
