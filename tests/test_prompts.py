"""The comparison by prompts: ranks, places, lists, pairs, and that it goes on; on tiny random networks."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from torch import Generator, Tensor

from vml_ldm import assets
from vml_ldm.assets import drawn_list, example_images, training_list
from vml_ldm.cli import main
from vml_ldm.evaluation import choosing, comparison, metrics, prompts
from vml_ldm.evaluation.choosing import SEED, WORST_RANK, shuffled
from vml_ldm.evaluation.gallery import Gallery, load_picture, ranks
from vml_ldm.evaluation.painters import PEERS, PRESETS, Painter, PeerPainter, StockPainter, Trial, named_painter
from vml_ldm.evaluation.prompts import Plan, PromptRow, Prompts, run, sharpness
from vml_ldm.evaluation.prompts_table import better_stock, paired_bootstrap, prompts_table
from vml_ldm.evaluation.prompts_tasks import PLACES, Place, draw_canvas, middle, pose, put_middle, quarter_mask
from vml_ldm.evaluation.rows import RowFile
from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline

SIZE = 64
LISTED = [(path.name, prompt) for path, prompt in example_images("validation")[:6]]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=Generator().manual_seed(seed))


# ranks


def test_a_picture_is_the_nearest_to_itself_and_ranks_count_what_is_nearer() -> None:
    gallery = torch.nn.functional.normalize(noise(9, 5) - 0.5, dim=1)
    assert ranks(gallery, gallery, range(9)) == [1] * 9
    asked, image = 4, torch.nn.functional.normalize(noise(1, 5, seed=1) - 0.5, dim=1)
    nearer = sum(float(image @ other) > float(image @ gallery[asked]) for other in gallery)
    assert ranks(image, gallery, [asked]) == [1 + nearer]
    order = torch.randperm(9, generator=Generator().manual_seed(2))
    assert ranks(image, gallery[order], [order.tolist().index(asked)]) == [1 + nearer]
    everyone = ranks(image.expand(9, -1), gallery, range(9))
    assert sorted(everyone) == list(range(1, 10))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Six pictures that ship in the box, as if they were those that were trained on."""
    if not metrics.has_perceptual_weights():
        pytest.skip("EfficientNet-Lite0 is not installed")
    folder = example_images("validation")[0][0].parent
    return Gallery(folder, SIZE, tmp_path_factory.mktemp("gallery"), LISTED)


def test_every_picture_of_a_gallery_ranks_first_on_every_colour(gallery: Gallery) -> None:
    names = [name for name, _ in LISTED]
    for colour in ((255, 255, 255), (150, 195, 235)):
        assert gallery.ranks(torch.stack([gallery.picture(n, colour) for n in names]), names, colour) == [1] * 6


def test_features_are_taken_once(gallery: Gallery, monkeypatch) -> None:
    picture, name = gallery.picture(LISTED[2][0])[None], LISTED[2][0]
    first = gallery.ranks(picture, [name])
    again = Gallery(gallery.folder, SIZE, gallery.cache, LISTED)
    monkeypatch.setattr(Gallery, "_measure", lambda *_: pytest.fail("taken again"))
    assert again.ranks(picture, [name]) == first
    with pytest.raises(FileNotFoundError, match=r"lacks nowhere\.webp"):
        Gallery(gallery.folder, SIZE, gallery.cache, [("nowhere.webp", "nothing")])


# lists


def test_the_lists_keep_to_the_split_and_to_the_rule() -> None:
    trained, drawn = training_list(), drawn_list()
    names = [name for name, _ in trained]
    assert len(set(names)) == len(names) and len({prompt for _, prompt in trained}) == len(trained)
    for split in ("held_out", "validation"):
        assert not {path.name for path, _ in example_images(split)} & set(names)
    assert set(drawn) <= set(trained) and len(set(drawn)) == len(drawn) == 48
    lines = Path(assets.__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()
    cells = [line.split("\t") for line in lines if not line.startswith("#")]
    places, worst = [int(cell[2]) for cell in cells], max(int(cell[3]) for cell in cells)
    order = shuffled(len(trained))
    assert [trained[order[place]] for place in places] == drawn and places == sorted(places) and worst <= WORST_RANK


def test_the_shuffle_is_of_the_seed() -> None:
    order = list(range(20))
    random.Random(SEED).shuffle(order)
    assert shuffled(20) == order != list(range(20))


def test_every_name_is_drawn_in_the_order_of_the_shuffle(model: str, gallery: Gallery, capsys, monkeypatch) -> None:
    """And what is written is read again as a list."""
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    monkeypatch.setattr(choosing, "STEPS", 2)
    monkeypatch.setattr(choosing, "BATCH", 4)
    drawn = list(choosing.draw_all(pipe, gallery))
    assert [(d.name, d.prompt) for d in drawn] == [LISTED[i] for i in shuffled(6)]
    assert [d.place for d in drawn] == list(range(6)) and all(1 <= d.rank <= 6 for d in drawn)
    monkeypatch.setattr(choosing, "BATCH", 1)
    assert [d.rank for d in choosing.draw_all(pipe, gallery)] == [d.rank for d in drawn]
    monkeypatch.setattr(choosing, "Gallery", lambda *_: gallery)
    choosing.main(["--count", "3", "--model", model, "--data", str(gallery.folder)])
    told = capsys.readouterr().out
    listed = gallery.cache / "listed.txt"
    listed.write_text(told, encoding="utf-8")
    assert assets._read_list(listed) == [(d.name, d.prompt) for d in drawn[:3]]
    assert "# of 3 tried in a shuffle's order (seed 2026); guidance 5, 2 steps" in told


# places


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_what_was_asked_for_ranks_first_where_it_belongs(gallery: Gallery, place: Place) -> None:
    """A perfect painter gets rank 1, sharpness 1 and, with the known pixels kept, no error in them."""
    cases = [comparison.Case(name, prompt, i, gallery.picture(name)) for i, (name, prompt) in enumerate(LISTED)]
    posed = pose(place, cases, gallery)
    found = gallery.ranks(posed.seen(posed.target), [name for name, _ in LISTED], place.colour)
    assert found == [1] * len(LISTED)
    hole = 1 - posed.known
    assert ((posed.target - posed.image).abs() * posed.known).max() == 0
    torch.testing.assert_close(sharpness(posed.target, posed.target, hole), torch.ones(len(LISTED)).double())
    share = hole.mean((1, 2, 3))
    expected = 0.75 if place.task == "complete" else (round(SIZE * place.hole) / SIZE) ** 2
    torch.testing.assert_close(share, torch.full_like(share, expected))
    alone = pose(place, cases[1:2], gallery)
    assert torch.equal(alone.image, posed.image[1:2]) and torch.equal(alone.target, posed.target[1:2])


def test_nothing_of_the_answer_is_in_what_is_given(gallery: Gallery) -> None:
    cases = [comparison.Case(*LISTED[0], 0, gallery.picture(LISTED[0][0]))]
    other = [comparison.Case(*LISTED[1], 0, gallery.picture(LISTED[1][0]))]
    for place in PLACES[:-1]:
        assert torch.equal(pose(place, cases, gallery).image, pose(place, other, gallery).image)
    posed = pose(PLACES[-1], cases, gallery)
    assert ((posed.image - 0.5) * (1 - posed.known)).abs().max() == 0


def test_canvases_and_quarters() -> None:
    assert torch.equal(sum(quarter_mask(8, q) for q in range(4)), torch.ones(1, 1, 8, 8))
    assert draw_canvas("white", 0, 16).eq(1).all() and draw_canvas("blue", 0, 16).flatten(1).std(1).max() == 0
    assert not torch.equal(draw_canvas("emoji", 0, 64), draw_canvas("emoji", 1, 64))
    path = example_images("held_out")[3][0]
    assert torch.equal(draw_canvas("picture", 3, 64), load_picture(path, 64))
    with pytest.raises(ValueError, match="canvas is 'green'; expected white, blue, emoji or picture"):
        draw_canvas("green", 0, 16)
    image = noise(2, 3, 16, 16)
    assert torch.equal(put_middle(image, middle(image, 8), 8), image)


# figures


def test_sharpness_is_of_the_hole_alone_and_falls_with_blur() -> None:
    asked, hole = noise(2, 3, 48, 48), torch.zeros(1, 1, 48, 48)
    hole[..., 12:36, 12:36] = 1
    soft = torch.nn.functional.avg_pool2d(asked, 5, stride=1, padding=2, count_include_pad=False)
    assert (sharpness(soft, asked, hole) < 0.2).all()
    torch.testing.assert_close(sharpness(0.5 * asked + 0.2, asked, hole), torch.full((2,), 0.25).double())
    far = asked.clone()
    far[..., :5, :] = 0  # more than the filter's reach away
    torch.testing.assert_close(sharpness(far, asked, hole), torch.ones(2).double())


def row(image: str = "a", seed: int = 0, method: str = "stock@3", **figures) -> PromptRow:
    figures = {"rank": 1, "psnr_known": 30.0, "edge_error": 0.1, "sharpness": 1.0, "spread": None} | figures
    return PromptRow(image, "fill", method, seed, "f", **figures, seconds=1.0, denoise=50, calls=53)


def rows_of(values, **more) -> list[PromptRow]:
    """Two seeds of each value's prompt."""
    return [row(f"{i}", seed, psnr_known=value, **more) for seed in (0, 1) for i, value in enumerate(values)]


def test_the_bootstrap_is_paired_and_draws_prompts() -> None:
    base = noise(20, seed=3).tolist()
    ours = rows_of([value + 2 for value in base])
    change = paired_bootstrap(ours, rows_of(base), "psnr_known")
    assert change.mean == pytest.approx(2) and change.low == pytest.approx(2) and change.high == pytest.approx(2)
    assert change.count == 20  # prompts: a second seed of the same makes no other interval
    values = noise(200, seed=4).double() - 0.5
    shift = paired_bootstrap(rows_of(values.tolist()), rows_of([0.0] * 200), "psnr_known")
    half = 1.96 * values.std().item() / 200**0.5
    assert shift.mean == pytest.approx(values.mean().item())
    assert shift.high - shift.mean == pytest.approx(half, rel=0.1) == pytest.approx(shift.mean - shift.low, rel=0.1)
    with pytest.raises(ValueError, match="0 with seed 0 came beside 1 with 0"):
        paired_bootstrap([row("0")], [row("1")], "rank")


def test_the_table_compares_to_the_better_stock() -> None:
    good, bad = rows_of([1.0] * 8, method="stock@3", rank=2), rows_of([1.0] * 8, method="stock@7.5", rank=4)
    ours = rows_of([9.0] * 8, method="fast", rank=1)
    methods = {"stock@7.5": bad, "stock@3": good, "fast": ours}
    assert better_stock(methods) == "stock@3" and better_stock({"fast": ours}) is None
    table = prompts_table({"fill": methods})
    assert "| fill  | fast      | stock@3 | +1.000 [+1.000, +1.000] |" in table
    assert "+8.00 [+8.00, +8.00]" in table and "| 0.500 " in table
    assert prompts_table({}) == "No prompt has been painted by every method yet."


# methods


def test_methods_by_name() -> None:
    assert isinstance(named_painter("stock@3"), StockPainter) and named_painter("stock@3").arguments == {
        "guidance_scale": 3.0
    }
    assert all(named_painter(name).arguments == {"preset": name} for name in PRESETS)
    ding = named_painter("ding@2")
    assert isinstance(ding, PeerPainter) and ding.evaluations == 2 and ding.arguments["guidance_scale"] == 2
    assert all(named_painter(name).arguments["guidance_scale"] == 7.5 for name in PEERS)
    for wrong in ("stock@much", "best@3@4", "worst", ""):
        with pytest.raises(ValueError, match="expected one of stock, balanced"):
            named_painter(wrong)


# a run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipe(model: str) -> VMLInpaintPipeline:
    pipe = VMLInpaintPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """The list of prompts is the gallery's."""
    monkeypatch.setattr(prompts, "drawn_list", lambda: LISTED)


def painted(seen: list):
    """A function that notes what it gets and paints the mask."""

    def function(prompt: str, image: Tensor, mask: Tensor, seed: int) -> Tensor:
        seen.append((prompt, image, mask, seed))
        return image * (1 - mask) + mask * noise(3, 1, 1, seed=seed)

    return function


@pytest.fixture
def plan(model: str) -> Plan:
    return Plan(
        model=model, images=2, seeds=2, batch=3, steps=2, methods=(named_painter("stock@3"),), places=PLACES[:1]
    )


def rows_in(folder: Path) -> RowFile:
    return RowFile(folder / "out", PromptRow)


def test_it_goes_on_and_pairs_prompts_and_seeds(pipe, plan: Plan, gallery, tmp_path: Path) -> None:
    seen: list = []
    trial = Trial("mine", {"k": 1}, function=painted(seen))
    plan = dataclasses.replace(plan, methods=(*plan.methods, trial))
    table = run(plan, pipe, rows_in(tmp_path), gallery)
    rows = list(rows_in(tmp_path).by_key.values())
    assert len(rows) == 8 and "| fill-white-108 | mine " in table
    by_method = [{(r.image, r.seed) for r in rows if r.method == m.name} for m in plan.methods]
    assert by_method[0] == by_method[1] == {(Path(LISTED[i][0]).stem, i + 1000 * s) for i in (0, 1) for s in (0, 1)}
    assert all((r.spread is None) == (r.seed < 1000) for r in rows)
    mine = [r for r in rows if r.method == "mine"]
    assert all(r.psnr_known == 100 and r.calls == 0 for r in mine) and all(
        r.denoise == 4 for r in rows if r not in mine
    )
    prompt, image, mask, seed = seen[-1]
    assert image.shape == (3, SIZE, SIZE) and mask.shape == (1, SIZE, SIZE) and mask[0, SIZE // 2, SIZE // 2] == 1
    assert mask[0, 0, 0] == 0 and prompt == LISTED[1][1] and seed == 1001
    count = len(seen)
    assert run(plan, pipe, rows_in(tmp_path), gallery) == table and len(seen) == count
    other = dataclasses.replace(plan, methods=(plan.methods[0], dataclasses.replace(trial, arguments={"k": 2})))
    run(other, pipe, rows_in(tmp_path), gallery)
    assert len(seen) == count + 5  # four results and the warm-up
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("rows.csv", "results", "table.md", "sheet-fill-white-108.png")
    }


def test_a_batch_is_what_its_images_are_alone(pipe, plan: Plan, gallery, tmp_path: Path) -> None:
    """Ranks and figures of a method do not depend on the batch, nor on a trial being called with one."""
    function = painted([])

    def batched(names, images, masks, seeds):
        return torch.stack([function(*item) for item in zip(names, images, masks, seeds, strict=True)])

    results = []
    for size, trial in ((1, Trial("mine", function=function)), (4, Trial("mine", function=batched, batched=True))):
        rows = RowFile(tmp_path / str(size), PromptRow)
        run(dataclasses.replace(plan, batch=size, methods=(*plan.methods, trial)), pipe, rows, gallery)
        found = sorted(rows.by_key.values(), key=lambda r: (r.method, r.image, r.seed))
        results.append([(r.image, r.method, r.seed, r.rank, round(r.psnr_known, 2), r.denoise) for r in found])
    assert results[0] == results[1]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("name", ["fast", "ding", "guess-guide", "red-diff"])
def test_solvers_paint_in_every_place(pipe, plan: Plan, gallery, tmp_path: Path, name: str, place: Place) -> None:
    asked = dataclasses.replace(plan, images=1, seeds=1, steps=4, methods=(named_painter(name),), places=(place,))
    rows = rows_in(tmp_path)
    run(asked, pipe, rows, gallery)
    (found,) = rows.by_key.values()
    assert found.place == str(place) and 1 <= found.rank <= len(LISTED) and found.calls > found.denoise > 0
    assert (found.psnr_unknown is None) == (found.perceptual is None) == (place.task != "complete")


def test_rows_of_stock_do_not_depend_on_our_solver(pipe, plan: Plan, gallery, tmp_path: Path, monkeypatch) -> None:
    trial = Prompts(plan, pipe, rows_in(tmp_path), gallery)
    stock, ours = named_painter("stock@3"), named_painter("fast")
    before = {method.name: trial.stamp_of(method) for method in (stock, ours)}
    assert before["stock@3"] != before["fast"] == trial.stamp
    digested: list[Path] = []
    monkeypatch.setattr(comparison, "_digest", lambda paths: str(digested.extend(paths)))
    comparison.stamp(plan, pipe, stock.modules)
    sources = {"images" if path.parent.name == "images" else path.stem for path in digested if path.suffix == ".py"}
    assert sources == set(stock.modules)


def test_only_the_table_of_rows_that_another_version_made(pipe, plan: Plan, gallery, tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    rows.append(
        [dataclasses.replace(row(Path(LISTED[i][0]).stem, i), place="fill-white-108") for i in range(2)],
    )
    table = run(plan, pipe, rows_in(tmp_path), gallery, solve=False)
    assert "| fill-white-108 | stock@3 | 2 " in table


def test_what_cannot_be_asked_for_is_refused(pipe, plan: Plan, gallery, tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match="9 prompts asked for; expected 1 to 6"):
        Prompts(dataclasses.replace(plan, images=9), pipe, rows_in(tmp_path), gallery)
    with pytest.raises(SystemExit):
        main(["prompts", "--help"])
    told = re.sub(r"-\n\s+", "-", capsys.readouterr().out)
    assert {"stock", *PRESETS, *PEERS, *map(str, PLACES)} <= set(re.findall(r"[a-z0-9-]+", told))
    for more, told in ((["--methods", "worst"], "no method is called 'worst'"), (["--places", "x"], "no place is")):
        assert main(["prompts", "-o", str(tmp_path / "new"), *more]) == 2
        assert told in capsys.readouterr().err
    assert main(["prompts", "-o", str(tmp_path / "new"), "--data", str(tmp_path), "--model", plan.model]) == 2
    assert f"{tmp_path} lacks" in capsys.readouterr().err


def test_a_painter_is_told_apart_by_what_it_is_passed() -> None:
    assert Painter("a", {"x": 1}) != Painter("a", {"x": 2}) and Painter("a", {"x": 1}) == Painter("a", {"x": 1})
