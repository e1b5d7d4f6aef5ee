"""Attacks: agreement with the libraries, the authors' variants, and what an attack may not touch."""

import pytest
import torch
from torch import nn

from impure_fast import PurifiedClassifier, attacks
from impure_fast.attacks import ATTACKS, AUTHORS, attack, expected_gradient, margin, parse, sign_steps
from impure_fast.errors import InputError
from impure_fast.evaluation.defences import baseline

from .conftest import global_generator_untouched, random_images

torchattacks = pytest.importorskip("torchattacks")
EPS, STEP = 8 / 255, 2 / 255
NEEDS = {
    "pgd": dict(steps=3, step_size=STEP),
    "mifgsm": dict(steps=3, step_size=STEP, decay=1.0),
    "difgsm": dict(steps=3, step_size=STEP, decay=0.0),
    "apgd-ce": dict(steps=5),
    "apgd-dlr": dict(steps=5),
    "cw": dict(steps=5),
    "deepfool": dict(steps=5),
    "square": dict(queries=20),
    "autoattack": dict(steps=5, queries=20),
    "eot-pgd": dict(steps=3, step_size=STEP, eot=2),
    "authors-pgd": dict(steps=3, step_size=STEP),
    "authors-mifgsm": dict(steps=3, step_size=STEP),
    "authors-difgsm": dict(steps=3, step_size=STEP, decay=1.0),
    "authors-cw2": dict(searches=2, steps=5),
    "authors-deepfool2": dict(step_size=STEP, steps=5),
}


@pytest.fixture(scope="module")
def model():
    """Twelve classes, curved enough that no two attacks coincide by accident."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(8 * 64, 12))
        return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def data(model):
    x = (random_images(6, 3, 16, 16) * 255).round() / 255
    return x, model(x).argmax(dim=1)


def run(name, model, data, **changes):
    return attack(name, model, *data, **{"eps": EPS, "seed": 3, **NEEDS.get(name, {}), **changes})


@pytest.mark.parametrize(
    ("name", "direct"),
    [
        ("fgsm", lambda m: torchattacks.FGSM(m, eps=EPS)),
        ("pgd", lambda m: torchattacks.PGD(m, eps=EPS, alpha=STEP, steps=3)),
        ("apgd-ce", lambda m: torchattacks.APGD(m, eps=EPS, steps=5, loss="ce", seed=3)),
        ("apgd-dlr", lambda m: torchattacks.APGD(m, eps=EPS, steps=5, loss="dlr", seed=3)),
    ],
)
def test_agrees_with_a_direct_call_of_the_library(name, direct, model, data):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wanted = direct(model)(*data)
    assert not torch.equal(wanted, data[0])
    torch.testing.assert_close(run(name, model, data), (wanted * 255).round() / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "direct"),
    [
        ({}, lambda m: torchattacks.PGD(m, eps=EPS, alpha=STEP, steps=3)),
        (dict(start="image"), lambda m: torchattacks.PGD(m, eps=EPS, alpha=STEP, steps=3, random_start=False)),
        (dict(start="image", decay=1.0), lambda m: torchattacks.MIFGSM(m, eps=EPS, alpha=STEP, steps=3, decay=1.0)),
        (
            dict(decay=0.5, diversity=True),
            lambda m: torchattacks.DIFGSM(
                m, eps=EPS, alpha=STEP, steps=3, decay=0.5, resize_rate=0.9, diversity_prob=0.5, random_start=True
            ),
        ),
        (dict(eot=3), lambda m: torchattacks.EOTPGD(m, eps=EPS, alpha=STEP, steps=3, eot_iter=3)),
    ],
)
def test_own_steps_are_the_library_s_where_it_has_them(options, direct, model, data):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = direct(model)(*data)
        torch.manual_seed(0)
        found = sign_steps(model, *data, EPS, steps=3, step_size=STEP, **options)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_repeats_itself_and_touches_nothing(name, model, data):
    model[0].train()
    try:
        with global_generator_untouched():
            first = run(name, model, data)
        assert model[0].training and not model.training
    finally:
        model.eval()
    assert torch.equal(first, run(name, model, data))
    levels = first * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert first.min() >= 0 and first.max() <= 1
    if name != "authors-cw2":  # theirs leaves the ball
        assert ((first - data[0]).abs() * 255).max() <= 8.001


def test_authors_take_their_first_gradient_at_the_image(model, data):
    x, y = data
    _, gradient = expected_gradient(model, x, y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1) - x
    wanted = (x + (start + STEP * gradient.sign()).clamp(-EPS, EPS)).clamp(0, 1)
    found = run("authors-pgd", model, data, steps=1)
    torch.testing.assert_close(found, (wanted * 255).round() / 255, atol=1e-6, rtol=0)
    assert not torch.equal(found, run("pgd", model, data, steps=1))


def test_cw2_of_one_image_is_as_near_as_foolbox_s(model, data):
    """For a single image the authors' slips vanish, and without a bound their objective is Carlini and Wagner's."""
    foolbox = pytest.importorskip("foolbox")
    x, y = data[0][:1], data[1][:1]
    options = dict(binary_search_steps=4, steps=60, stepsize=0.01, confidence=0, initial_const=1, abort_early=False)
    direct = foolbox.attacks.L2CarliniWagnerAttack(**options)
    _, theirs, fooled = direct(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=None)
    ours = ATTACKS["authors-cw2"](model, x, y, 1.0, 0, searches=4, steps=60, confidence=0.0, constant=1.0)
    assert fooled.item() and model(ours).argmax() != y
    assert (ours - x).norm() == pytest.approx(float((theirs - x).norm()), rel=0.2)


def test_cw2_gives_the_clean_image_back_where_it_fails(model, data):
    assert torch.equal(run("authors-cw2", model, data, confidence=1e6), data[0])


def test_deepfool2_fools_what_foolbox_s_fools(model, data):
    foolbox = pytest.importorskip("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    _, _, theirs = foolbox.attacks.LinfDeepFoolAttack(steps=50)(wrapped, *data, epsilons=[16 / 255])
    options = dict(step_size=STEP, steps=50, eps=16 / 255)
    ours = model(run("authors-deepfool2", model, data, **options)).argmax(dim=1) != data[1]
    assert ours.all() and theirs.all()
    wrong = (data[0], (data[1] + 1) % 12)
    assert torch.equal(run("authors-deepfool2", model, wrong, **options), data[0])


def test_averaging_helps_against_noise(data):
    """A gradient drowned in noise of its own: EOT finds its sign, one call does not."""
    weights = torch.linspace(-1, 1, 768)
    x, y = data[0], torch.zeros(6, dtype=torch.int64)

    class Noisy(nn.Module):
        def forward(self, x):
            noise = 3 * torch.randn(len(x), 768)
            return torch.stack((-(x.flatten(1) * (weights + noise)).sum(dim=1), torch.zeros(len(x))), dim=1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        agree = [
            (expected_gradient(Noisy(), x, y, "margin", n)[1].flatten(1).sign() == weights.sign()) for n in (1, 64)
        ]
    assert agree[0].float().mean() < 0.7 < 0.85 < agree[1].float().mean()


def test_a_detached_model_has_a_zero_gradient_and_leaves_the_image(model, data):
    def detached(images):
        return model(images.detach())

    _, gradient = expected_gradient(detached, *data)
    assert not gradient.any()
    found = sign_steps(detached, *data, EPS, steps=2, step_size=STEP, start="image", decay=1.0)
    assert torch.equal(found, data[0])


def test_margin_is_positive_where_the_decision_is_wrong():
    logits = torch.tensor([[3.0, 1.0, 0.0], [1.0, 3.0, 0.0]])
    assert margin(logits, torch.tensor([0, 0])).tolist() == [-2, 2]


def test_autoattack_is_at_least_as_strong_as_its_first_part(model, data):
    x, y = data
    whole, part = (model(run(name, model, data)).argmax(dim=1) == y for name in ("autoattack", "apgd-ce"))
    assert whole.sum() <= part.sum()
    rand = run("autoattack", model, data, version="rand", eot=2)
    assert (rand != x).flatten(1).any(dim=1).all()  # an image that was never fooled is attacked all the same


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("pdg", {}, "no attack 'pdg'; choose one of fgsm, pgd"),
        ("fgsm", dict(steps=3), r"'fgsm' cannot run with parameters \['steps'\]: .*unexpected"),
        ("eot-pgd", dict(steps=3), r"'eot-pgd' cannot run with parameters \['steps'\]: .*missing.*step_size"),
    ],
)
def test_unknown_attacks_and_parameters_are_named(name, parameters, says, model, data):
    with pytest.raises(InputError, match=says):
        attack(name, model, *data, eps=EPS, seed=0, **parameters)


def test_attacks_are_named_with_their_parameters():
    text = "eot-pgd,steps=3,step_size=2,eps=8,loss=margin"
    wanted = dict(steps=3, step_size=2 / 255, eps=8 / 255, loss="margin")
    assert parse(text) == ("eot-pgd", wanted)
    assert [parse(text)[0] for text in AUTHORS].count("authors-difgsm") == 2 and len(AUTHORS) == 9
    for wrong in ("pgd,steps", "pgd,step_size=two", "pgd,steps=ten", "eot-pgd,loss=3"):
        with pytest.raises(InputError, match=f"{wrong.partition(',')[2]!r} in {wrong!r} cannot be used"):
            parse(wrong)


class Noisy(nn.Module):
    """Decides by a linear score under noise, afresh at every call."""

    def __init__(self, classes=4):
        super().__init__()
        weight = torch.randn(classes, 3 * 64, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight / 8, requires_grad=False)

    def forward(self, x):
        logits = (x.flatten(1) - 0.5) @ self.weight.T
        return logits + torch.randn_like(logits) / 2


@pytest.mark.parametrize("name", ["square", "autoattack"])
def test_a_random_model_is_attacked_on_its_expectation_everywhere(name):
    model, images = Noisy(), 0.2 + 0.6 * random_images(32, 3, 8, 8)
    labels = ((images.flatten(1) - 0.5) @ model.weight.T).argmax(dim=1)
    options = dict(queries=200) if name == "square" else dict(version="rand", steps=12)
    attacked = attack(name, model, images, labels, eps=EPS, seed=0, eot=8, **options)
    assert (attacked != images).flatten(1).any(dim=1).all()  # none is spared for a call that was right by chance
    risen = [margin((x.flatten(1) - 0.5) @ model.weight.T, labels).mean() for x in (images, attacked)]
    assert risen[1] > risen[0] + {"square": 0, "autoattack": 0.2}[name]  # Square sees the noise in every query


def test_a_shortened_autoattack_still_halves_its_step(model, data, monkeypatch):
    import pyautoattack

    made = []

    class Kept(pyautoattack.AutoAttack):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(pyautoattack, "AutoAttack", Kept)
    run("autoattack", model, data, version="rand", steps=10, eot=1)
    assert [(p.n_iter_2, p.n_iter_min, p.size_decr) for p in (made[0].apgd, made[0].apgd_targeted)] == [(2, 1, 1)] * 2


@pytest.mark.parametrize("version", ["rand", "standard"])
def test_two_classes_can_be_attacked(version):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)).eval()
    images = random_images(4, 3, 8, 8)
    options = dict(version=version, steps=3, queries=5, eot=1)
    assert (
        attack("autoattack", model, images, model(images).argmax(dim=1), eps=EPS, seed=0, **options).shape
        == images.shape
    )


def test_rounding_stays_in_a_ball_between_levels(model, data):
    images, labels = data
    for eps in (0.5 / 255, 1.5 / 255):
        attacked = attack("pgd", model, images, labels, eps=eps, seed=0, steps=3, step_size=eps)
        assert ((attacked - images).abs() * 255).max() <= eps * 255 + 1e-3


@pytest.mark.parametrize("wrong", [dict(starts="anywhere"), dict(starts=()), dict(loss="dlr")])
def test_unknown_starts_and_losses_are_named(wrong, model, data):
    with pytest.raises(InputError, match=next(iter(wrong))):
        run("eot-pgd", model, data, **wrong)
    assert torch.equal(run("eot-pgd", model, data, starts="image"), run("eot-pgd", model, data, starts=("image",)))


@pytest.mark.parametrize("name", ["pgd", "eot-pgd", "square", "autoattack"])
def test_a_killed_attack_goes_on_to_the_same_images(name, model, data, monkeypatch, tmp_path):
    monkeypatch.setattr(attacks, "KEPT_EVERY", 0.0)
    keep, noisy = tmp_path / "part.npz", baseline("resize-pad").purifier

    def attacked(images=6, stop=None, **changes):
        done = []

        def progress(count, total):
            done.append(count)
            if count == stop:
                raise KeyboardInterrupt

        pipeline = PurifiedClassifier(model, noisy, mean=(0, 0, 0), std=(1, 1, 1), seed=5)
        return run(name, pipeline, [x[:images] for x in data], batch=2, progress=progress, **changes), done

    whole, done = attacked()
    assert done == [0, 2, 4, 6]
    with pytest.raises(KeyboardInterrupt):
        attacked(stop=4, keep=keep)
    resumed, done = attacked(keep=keep)
    assert done == [2, 4, 6]  # the batch at which it was killed was not kept yet
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    again, done = attacked(keep=keep)
    assert done == [6]
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    keep.unlink()
    for images, counts in ((3, [0, 2, 3]), (6, [2, 4, 6]), (4, [4])):  # a batch that is not whole is made again
        some, done = attacked(images, keep=keep)
        assert done == counts
        torch.testing.assert_close(some[: images - images % 2], whole[: images - images % 2], rtol=0, atol=0)
    some, done = attacked(3, keep=keep)  # of which the file has a larger last batch
    assert done == [0, 2, 3]
    torch.testing.assert_close(some, attacked(3)[0], rtol=0, atol=0)
    keep.write_bytes(b"PK")
    with pytest.raises(InputError, match="part.npz is no attack that can go on"):
        attacked(keep=keep)
