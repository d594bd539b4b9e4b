"""Images here are made up unless GIDEF_DATA names a folder with pneumoniamnist.npz."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gidef.errors import InputError
from gidef.report import pictures


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def has_block(picture, colour, side=100):
    """Whether the picture holds a one-coloured square of that side at least."""
    same = (np.abs(picture.astype(int) - colour).max(axis=2) <= 1).astype(int)
    area = np.pad(same.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return bool(((area[side:, side:] - area[:-side, side:] - area[side:, :-side] + area[:-side, :-side]) == side * side).any())


def flat(colours, channels=3):
    return torch.tensor(colours, dtype=torch.uint8).reshape(-1, channels, 1, 1).expand(-1, channels, 28, 28)


def test_a_contact_sheet_shows_each_image_enlarged_and_untouched(tmp_path):
    private = flat([[200, 30, 40], [10, 220, 50]])
    recovered = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]).reshape(2, 3, 1, 1).expand(-1, 3, 28, 28)
    path = pictures.grid(
        tmp_path / "sheets" / "sheet.png",
        [("private", private), ("undefended", recovered)],
        row_labels=["victim 3, monocyte", "victim 1, platelet"],
        title="bloodmnist, untrained checkpoint (SYNTHETIC data)",
        captions=[None, ["24.4 dB", "21.0 dB"]],
    )
    picture = pixels(path)
    for colour in ([200, 30, 40], [10, 220, 50], [0, 0, 255], [255, 255, 0]):
        assert has_block(picture, colour), colour
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_every_pixel_becomes_a_square_of_whole_pixels(tmp_path):
    board = (np.indices((28, 28)).sum(axis=0) % 2 * 255).astype(np.uint8)[None, None]
    picture = pixels(pictures.grid(tmp_path / "board.png", [("board", board)]))
    rows = [row for row in picture[:, :, 0] if (row == 0).sum() == 14 * 5]
    assert len(rows) == 28 * 5  # 140 rows, each with 14 black runs of 5
    edges = np.flatnonzero(np.diff(rows[0].astype(int)))
    assert set(np.diff(edges)) == {5}


def test_grey_images_stay_grey_values_are_clamped_and_nan_is_mid_grey(tmp_path):
    images = torch.tensor([-1.0, 0.25, 2.0, float("nan")]).reshape(4, 1, 1, 1).expand(-1, 1, 28, 28)
    picture = pixels(pictures.grid(tmp_path / "grey.png", [("grey", images)]))
    for value in (0, 64, 255, 128):
        assert has_block(picture, [value] * 3), value


def test_rows_beyond_the_limit_are_left_out(tmp_path):
    images = flat([[250, 0, 0], [0, 250, 0], [0, 0, 250]])
    picture = pixels(pictures.grid(tmp_path / "a.png", [("x", images)], max_rows=2))
    assert has_block(picture, [0, 250, 0]) and not has_block(picture, [0, 0, 250])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": [("a", flat([[1, 2, 3]])), ("b", flat([[1, 2, 3]] * 2))]}, "as many in each"),
        ({"columns": []}, "as many in each"),
        ({"columns": [("a", torch.zeros(2, 28, 28))]}, "column 'a': shape"),
        ({"columns": [("a", torch.zeros(2, 2, 28, 28))]}, "C of 1 or 3"),
        ({"columns": [("a", flat([[1, 2, 3]]))], "row_labels": ["x", "y"]}, "2 labels or captions for 1 images"),
    ],
)
def test_a_sheet_that_does_not_fit_together_is_refused(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        pictures.grid(tmp_path / "a.png", **arguments)
    assert not list(tmp_path.iterdir())


def test_an_ending_that_is_no_picture_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected .png, .pdf or .svg"):
        pictures.learning_curves(tmp_path / "a.jpeg2", {"a": [(1, 0.5)]})


def test_a_preview_has_a_row_per_class_even_for_an_empty_one(tmp_path):
    images = flat([[250, 0, 0], [0, 250, 0], [0, 0, 250], [90, 90, 0]])
    picture = pixels(pictures.preview(tmp_path / "a.png", images, torch.tensor([0, 2, 0, 0]), ["a", "none of these", "c"], per_class=2))
    assert has_block(picture, [250, 0, 0]) and has_block(picture, [0, 250, 0]) and has_block(picture, [0, 0, 250])
    assert not has_block(picture, [90, 90, 0])  # the third of its class


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (10, 8), (5, 11), (5, 100), (200, 9)])
def test_partition_bars_draw_for_few_and_many_clients_and_classes(tmp_path, clients, classes):
    counts = torch.randint(0, 50, (clients, classes), generator=torch.Generator().manual_seed(0))
    names = [f"_cost in $ {number}" for number in range(classes)]
    assert pixels(pictures.partition_bars(tmp_path / "a.png", counts, names, title="synthetic data")).std() > 20
    with pytest.raises(InputError, match="one name per class"):
        pictures.partition_bars(tmp_path / "b.png", counts, names[1:])


def test_a_bar_is_as_high_as_its_count(tmp_path):
    picture = pixels(pictures.partition_bars(tmp_path / "a.png", [[300, 0], [0, 100]], ["a", "b"]))
    heights = []
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):  # Okabe-Ito's blue and orange
        same = (np.abs(picture.astype(int) - colour).max(axis=2) <= 2)[:, : picture.shape[1] // 2 if colour[0] == 0 else picture.shape[1]]
        heights.append(same.sum(axis=0).max())
    assert heights[0] / heights[1] == pytest.approx(3, rel=0.05)


def test_curves_draw_with_missing_points_and_empty_lines(tmp_path):
    curves = {f"defence {number}": [(1, 0.1), (2, None), (3, 0.1 * number)] for number in range(9)} | {"_none yet": []}
    assert pixels(pictures.learning_curves(tmp_path / "a.png", curves, title="t " * 60, chance=0.125)).std() > 10
    pictures.learning_curves(tmp_path / "b.png", {})


def test_attack_curves_take_one_loss_or_many_and_leave_out_failed_ones(tmp_path):
    losses = {"one": torch.linspace(1, 0.01, 20), "many": torch.rand(4, 20) + 0.1, "failed": [float("nan")] * 3, "signed": [-1.0, 0.0]}
    losses["many"][0, 3] = float("nan")
    pictures.attack_curves(tmp_path / "a.png", losses, title="x", iterations=dict.fromkeys(losses, 2000))
    pictures.attack_curves(tmp_path / "b.pdf", {"one": losses["one"]})
    with pytest.raises(InputError, match=r"no iterations given for \['one'\]"):
        pictures.attack_curves(tmp_path / "c.png", {"one": [1.0]}, iterations={"two": 3})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.pdf"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order."""
    kept, save = [], pictures._save
    monkeypatch.setattr(pictures, "_save", lambda figure, path: kept.append(figure) or save(figure, path))
    return kept


def names_in(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_attacks_that_stopped_early_stay_in_the_loss_curves_at_their_last_loss(tmp_path, figures):
    nan, inf = float("nan"), float("inf")
    all_stopped = [[8.0, 4.0, nan, nan, nan], [6.0, 3.0, 1.0, nan, nan], [9.0, 9.0, 5.0, 2.0, nan]]
    some = [[inf, 7.0, nan, 5.0, 4.0], [nan] * 5, [2.0, 1.0, 1.0, 1.0, 1.0], [inf] * 5]
    late = [[nan, inf, 3.0, 2.0, 1.0]]
    pictures.attack_curves(tmp_path / "a.png", {"all": all_stopped, "some": some, "late": late, "none": [[nan] * 5] * 2}, iterations=40)
    axes = figures[0].axes[0]
    assert names_in(figures[0]) == ["all", "some (2 of 4 without a finite loss)", "late", "none (no finite loss)"]

    def last_of(curve, upto):
        known = [value for value in curve[: upto + 1] if np.isfinite(value)]
        return known[-1:]

    for line, curves in zip(axes.get_lines(), (all_stopped, some, late), strict=False):
        expected = []
        for point in range(5):
            known = [value for curve in curves for value in last_of(curve, point)]
            expected += [(10.0 * point, float(np.median(known)))] if known else []
        assert list(zip(*line.get_data(), strict=True)) == expected
    assert len(axes.get_lines()) == 4 and len(axes.get_lines()[3].get_xdata()) == 0
    assert axes.get_yscale() == "linear", "from 1 to 9"


def curves_of(defences, seeds=3):
    """(curves, label → defence) of this many defences, as a comparison names them."""
    families = {f"learned + client DP + secure sum {defence}, seed {seed}": f"learned + client DP + secure sum {defence}" for defence in range(defences) for seed in range(seeds)}
    return {label: [(step, (step + place / 9) / 40) for step in range(1, 31)] for place, label in enumerate(families)}, families


@pytest.mark.parametrize("count", [3, 21, 42, 72])
def test_a_figure_grows_with_the_names_of_its_curves(tmp_path, figures, count):
    curves, families = curves_of(count // 3)
    pictures.learning_curves(tmp_path / "a.png", curves, title="t " * 60, chance=0.125)
    pictures.learning_curves(tmp_path / "b.png", curves, chance=0.125, families=families)
    pictures.attack_curves(tmp_path / "c.png", {label: [1.0, 0.5, 0.1] for label in curves}, title="title", iterations=100)
    pictures.progress_curves(tmp_path / "d.png", {label: [9.0, 10.0] for label in curves}, dict.fromkeys(curves, 100), title="title")
    for figure in figures:
        figure.draw_without_rendering()
        axes, legend = figure.axes[0].get_window_extent(), figure.axes[0].get_legend().get_window_extent()
        assert legend.x0 > axes.x1 and legend.y0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.y1 <= figure.bbox.y1
        assert axes.width > 3.9 * figure.dpi and axes.height > 2.9 * figure.dpi
    assert [len(names_in(figure)) for figure in figures] == [count + 1, 1 + (count // 3 if count > 18 else count), count, count]
    assert len({str(pictures._line(number)) for number in range(count)}) == count, "told apart by what the legend shows"


def test_many_seeds_of_a_defence_are_thin_and_alike_and_named_once(tmp_path, figures):
    curves, families = curves_of(7)
    pictures.learning_curves(tmp_path / "a.png", curves, families=families)
    assert names_in(figures[0]) == list(dict.fromkeys(families.values()))
    lines = figures[0].axes[0].get_lines()
    styles = [(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in lines]
    assert len({colour for colour, _, _ in styles}) == 7 and all(len(set(styles[place : place + 3])) == 1 for place in range(0, 21, 3))
    assert max(width for _, _, width in styles) < 1
    assert [[tuple(point) for point in line.get_xydata()] for line in lines] == [[(step, 100 * value) for step, value in points] for points in curves.values()]


def test_threads_draw_what_one_thread_draws(tmp_path):
    def draw(name):
        pictures.learning_curves(tmp_path / f"{name}.png", {"a": [(1, 0.1), (2, 0.5)]}, title="title")

    draw("alone")
    workers = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert all((pixels(tmp_path / f"{number}.png") == pixels(tmp_path / "alone.png")).all() for number in range(4))


def test_pyplot_and_its_global_state_are_not_used():
    source = Path(pictures.__file__).read_text()
    assert "pyplot" not in source and "rcParams" not in source


@pytest.mark.skipif(not os.environ.get("GIDEF_DATA"), reason="real images only with GIDEF_DATA")
def test_real_grey_images_draw(tmp_path):
    with np.load(Path(os.environ["GIDEF_DATA"]) / "pneumoniamnist.npz") as archive:
        images, labels = archive["train_images"][:64, None], archive["train_labels"][:64, 0]
    assert pixels(pictures.preview(tmp_path / "a.png", images, labels, ["normal", "pneumonia"])).std() > 20
