"""Adapters against the real libraries, and the traps that such adapters fall into."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from impure_fast import PurifiedClassifier
from impure_fast.errors import InputError, InputTypeError
from impure_fast.integrations.robustbench import robustbench_model
from impure_fast.integrations.torchattacks import Attackable

from .conftest import global_generator_untouched, random_images, small_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(6 * 144, 10)).eval()


@pytest.fixture(scope="module")
def purifier():
    return small_model()


@pytest.fixture
def pipeline(classifier, purifier):
    return PurifiedClassifier(classifier, purifier, mean=MEAN, std=STD, seed=1)


IMAGES = random_images(4, 3, 24, 24)


def test_attackable_keeps_eval_mode_whatever_the_library_does(pipeline):
    torchattacks = pytest.importorskip("torchattacks")
    model = Attackable(pipeline)
    model.train()
    assert not any(module.training for module in model.modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attacked = torchattacks.PGD(model, eps=8 / 255, alpha=4 / 255, steps=2)(IMAGES, torch.arange(4))
    assert not any(module.training for module in model.modules())
    assert 0 < (attacked - IMAGES).abs().max() <= 8 / 255 + 1e-6


def test_attackable_gives_the_pipeline_s_own_logits_and_gradient(classifier, purifier):
    pipelines = [
        PurifiedClassifier(classifier, purifier, mean=MEAN, std=STD, mode="deterministic").eval() for _ in range(2)
    ]
    leaves = [IMAGES.clone().requires_grad_() for _ in range(2)]
    logits = [pipelines[0](leaves[0]), Attackable(pipelines[1])(leaves[1])]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(x[:, 3].sum(), leaf)[0] for x, leaf in zip(logits, leaves, strict=True)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_identity_gradient_is_the_classifier_s_at_the_purified_image(classifier, purifier):
    pipeline = PurifiedClassifier(classifier, purifier, mean=MEAN, std=STD, mode="deterministic")
    purified = pipeline.purify(IMAGES).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(pipeline.classify(purified)[:, 2].sum(), purified)
    leaf = IMAGES.clone().requires_grad_()
    model = Attackable(pipeline, gradient="identity")
    (found,) = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(IMAGES), pipeline(IMAGES), atol=1e-5, rtol=0)


def test_expectation_is_over_fresh_draws_in_one_call(classifier, purifier):
    def fresh():
        return PurifiedClassifier(classifier, purifier, mean=MEAN, std=STD, seed=1)

    found = Attackable(fresh(), eot=3)(IMAGES)
    pipeline = fresh()
    probabilities = torch.stack([pipeline(IMAGES).softmax(dim=1) for _ in range(3)])
    assert (probabilities[0] - probabilities[1]).abs().max() > 1e-6
    torch.testing.assert_close(found.exp(), probabilities.mean(dim=0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("options", "says"), [(dict(gradient="none"), "gradient='none'"), (dict(eot=0), "eot=0")])
def test_attackable_refuses(pipeline, options, says):
    with pytest.raises(InputError, match=says):
        Attackable(pipeline, **options)


def test_robustbench_s_contract(classifier, purifier):
    """Its own words: gradients that are not zero, a deterministic forward, no optimisation loop; [0, 1] in, logits
    out, in eval mode, whatever the batch."""
    model = robustbench_model(classifier, purifier, mean=MEAN, std=STD)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with global_generator_untouched():
        first, again = model(IMAGES), model(IMAGES)
    assert torch.equal(first, again)
    torch.testing.assert_close(torch.cat([model(x[None]) for x in IMAGES]), first, atol=1e-5, rtol=0)
    assert (first.sum(dim=1) - 1).abs().max() > 1e-3
    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    assert (gradient.flatten(1).abs().sum(dim=1) > 0).all()


def test_autoattack_s_own_checks_find_no_fault_with_the_deterministic_pipeline(classifier, purifier, caplog):
    checks = pytest.importorskip("pyautoattack.checks")
    import logging

    model = robustbench_model(classifier, purifier, mean=MEAN, std=STD)
    log = logging.getLogger("auto-attack")
    y = torch.arange(4)
    checks.check_randomized(model, IMAGES, y, bs=4, logger=log)
    checks.check_range_output(model, IMAGES, logger=log)
    assert not caplog.records
    checks.check_randomized(PurifiedClassifier(classifier, purifier, mean=MEAN, std=STD), IMAGES, y, bs=4, logger=log)
    assert "randomized" in caplog.text


def test_adapters_survive_a_copy_and_a_pickle(classifier, purifier):
    model = Attackable(robustbench_model(classifier, purifier, mean=MEAN, std=STD))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGES), model(IMAGES)) and not other.training


def test_foolbox_sees_the_same_logits_without_a_normalisation_of_its_own(pipeline, classifier, purifier):
    foolbox = pytest.importorskip("foolbox")
    model = robustbench_model(classifier, purifier, mean=MEAN, std=STD)
    torch.testing.assert_close(foolbox.PyTorchModel(model, bounds=(0, 1))(IMAGES), model(IMAGES), atol=1e-6, rtol=0)


@pytest.fixture
def art_classifier(classifier, purifier):
    pytest.importorskip("art", reason="the extra art is not installed")
    from art.estimators.classification import PyTorchClassifier

    from impure_fast.integrations.art import ARTPurifier

    def build(**options):
        defence = ARTPurifier(purifier, device_type="cpu", **options)
        return PyTorchClassifier(
            classifier,
            nn.CrossEntropyLoss(),
            (3, 24, 24),
            10,
            clip_values=(0, 1),
            preprocessing=(np.reshape(MEAN, (3, 1, 1)), np.reshape(STD, (3, 1, 1))),
            preprocessing_defences=defence,
            device_type="cpu",
        )

    return build


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_art_predicts_the_pipeline_s_logits_in_any_batch(art_classifier, classifier, purifier, batch):
    pipeline = PurifiedClassifier(classifier, purifier, mean=MEAN, std=STD, seed=1)
    found = art_classifier(seed=1).predict(IMAGES.numpy(), batch_size=batch)
    np.testing.assert_allclose(found, pipeline(IMAGES).detach().numpy(), atol=1e-5)


def test_art_sees_the_exact_gradient(art_classifier, classifier, purifier):
    pipeline = PurifiedClassifier(classifier, purifier, mean=MEAN, std=STD, mode="deterministic")
    leaf, y = IMAGES.clone().requires_grad_(), torch.arange(4)
    (wanted,) = torch.autograd.grad(nn.functional.cross_entropy(pipeline(leaf), y, reduction="sum"), leaf)
    found = art_classifier(mode="deterministic").loss_gradient(
        IMAGES.numpy(), np.eye(10, dtype=np.float32)[:4]
    )  # one-hot
    scale = wanted.abs().max()
    assert scale > 0
    # ART averages the loss over the batch; the direction is what an attack takes.
    factor = float((torch.from_numpy(found) * wanted).sum() / wanted.square().sum())
    torch.testing.assert_close(torch.from_numpy(found), factor * wanted, atol=1e-5 * float(factor * scale), rtol=1e-3)


def test_art_attacks_run_through_the_purifier(art_classifier):
    from art.attacks.evasion import FastGradientMethod

    attack = FastGradientMethod(art_classifier(mode="deterministic"), eps=8 / 255)
    attacked = attack.generate(IMAGES.numpy(), np.arange(4))
    assert 0 < np.abs(attacked - IMAGES.numpy()).max() <= 8 / 255 + 1e-6


def test_art_integers_are_refused(art_classifier):
    with pytest.raises(InputTypeError, match="uint8"):
        art_classifier().predict((IMAGES.numpy() * 255).astype(np.uint8))


def test_integer_mean_and_std_do_not_round_the_image(classifier, purifier):
    whole, real = (
        PurifiedClassifier(classifier, purifier, mean=m, std=s, mode="deterministic")
        for m, s in (((0, 0, 0), (1, 1, 1)), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    )
    assert torch.equal(whole(IMAGES), real(IMAGES))
