"""IMPureConfig: what it refuses, what it keeps, and how it reads the authors' options."""

import json
import pickle

import pytest

from impure_fast import Error, IMPureConfig
from impure_fast.config import PRESETS
from impure_fast.errors import ConfigError

from .conftest import SMALL, small_config

# field at fault, values that differ from SMALL (24 px, patch 4, width 32, 2 blocks, 4 heads, K=4)
IMPOSSIBLE = [
    ("image_size", {"image_size": 0}),
    ("image_size", {"image_size": -24}),
    ("image_size", {"image_size": 24.0}),
    ("image_size", {"image_size": "24"}),
    ("patch_size", {"patch_size": 0}),
    ("patch_size", {"patch_size": 5}),  # 24 % 5
    ("embed_dim", {"embed_dim": 0}),
    ("embed_dim", {"embed_dim": 30, "num_heads": 3}),  # sin-cos wants multiples of 4
    ("num_heads", {"num_heads": 0}),
    ("num_heads", {"num_heads": 5}),
    ("depth", {"depth": 0}),
    ("depth", {"depth": 2.0}),
    ("decoder_embed_dim", {"decoder_embed_dim": 26, "decoder_num_heads": 2}),
    ("decoder_num_heads", {"decoder_num_heads": 7}),
    ("decoder_depth", {"decoder_depth": -1}),
    ("mlp_ratio", {"mlp_ratio": 0}),
    ("mlp_ratio", {"mlp_ratio": -4.0}),
    ("mlp_ratio", {"mlp_ratio": float("nan")}),
    ("mlp_ratio", {"mlp_ratio": float("inf")}),
    ("mlp_ratio", {"mlp_ratio": 0.01}),  # no hidden unit left
    ("mlp_ratio", {"mlp_ratio": "4"}),
    ("num_chunks", {"num_chunks": 1}),
    ("num_chunks", {"num_chunks": 0}),
    ("num_chunks", {"num_chunks": 4.0}),
    ("num_chunks", {"num_chunks": 9, "random_order": False}),  # no fixed lattice of 9
    ("out_indices", {"out_indices": (0, 2)}),  # depth 2
    ("out_indices", {"out_indices": (-1,)}),
    ("out_indices", {"out_indices": (0, 0)}),
    ("out_indices", {"out_indices": ("0",)}),
    ("out_indices", {"out_indices": 0}),
    ("image_mask", {"image_mask": "none"}),
    ("feature_mask", {"feature_mask": True}),
    ("image_step", {"image_step": 1000}),
    ("image_step", {"image_step": -1}),
    ("image_step", {"image_step": 400.0}),
    ("feature_step", {"feature_step": 1000}),
    ("feature_step", {"feature_step": "600"}),
    ("image_step_range", {"image_step_range": (200, 1001)}),
    ("image_step_range", {"image_step_range": (-1, 600)}),
    ("image_step_range", {"image_step_range": (600, 600)}),
    ("image_step_range", {"image_step_range": (200,)}),
    ("image_step_range", {"image_step_range": 200}),
    ("image_step_range", {"image_step_range": (0.5, 600.0)}),
    ("feature_step_range", {"feature_step_range": (1000, 200)}),
    ("feature_step_range", {"feature_step_range": (1, 2, 3)}),
    ("norm_eps", {"norm_eps": -1e-6}),
    ("norm_eps", {"norm_eps": "1e-6"}),
    ("mean", {"mean": (0.5, 0.5)}),
    ("mean", {"mean": 0.5}),
    ("mean", {"mean": (0.5, "0.5", 0.5)}),
    ("std", {"std": (0.5, 0.5, 0.0)}),
    ("std", {"std": (0.5, 0.5, -0.5)}),
    ("std", {"std": (0.5,)}),
    ("std", {"std": "abc"}),
    ("tile_size", {"tile_size": 0}),
    ("tile_size", {"tile_size": 22}),  # no multiple of 4
    ("tile_size", {"tile_size": 52}),  # the table ends at 48
    ("tile_size", {"tile_size": 20}),  # 25 patches, K=4
    ("tile_size", {"tile_size": 24.0}),
    ("tile_stride", {"tile_stride": 0}),
    ("tile_stride", {"tile_stride": 25}),
    ("tile_stride", {"tile_stride": 2.5}),
    ("random_order", {"random_order": "no"}),
    ("pixel_conv", {"pixel_conv": None}),
]


@pytest.mark.parametrize(("field", "values"), IMPOSSIBLE, ids=[f"{f}-{next(iter(v.values()))}" for f, v in IMPOSSIBLE])
def test_impossible_config_is_refused_naming_field_and_value(field, values):
    with pytest.raises(ConfigError) as caught:
        small_config(**values)
    shown = list(values[field]) if isinstance(values[field], tuple) else values[field]
    assert str(caught.value).startswith((f"{field}={values[field]!r}: ", f"{field}={shown!r}: "))


def test_config_error_is_one_of_ours_and_a_value_error():
    with pytest.raises(ValueError, match="depth"):
        small_config(depth=0)
    assert issubclass(ConfigError, Error)


def test_smallest_and_largest_legal_values_are_accepted():
    small_config(image_step=0, feature_step=999, image_step_range=(0, 1), feature_step_range=(999, 1000))
    small_config(tile_size=48, tile_stride=48, out_indices=(), num_chunks=2, mlp_ratio=0.125)
    small_config(num_chunks=36)  # one patch a chunk


def test_round_trip_through_a_dictionary_and_through_json_gives_an_equal_config():
    for config in (SMALL, *PRESETS.values()):
        assert IMPureConfig.from_dict(config.to_dict()) == config
        through_json = IMPureConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert through_json == config
        assert hash(through_json) == hash(config)  # lists have become tuples
        assert pickle.loads(pickle.dumps(config)) == config


def test_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        SMALL.depth = 3


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"\['chunks', 'dpeth'\].*num_chunks"):
        IMPureConfig.from_dict({"dpeth": 3, "chunks": 4})


def test_defaults_are_the_released_network():
    config = IMPureConfig()
    assert (config.image_size, config.patch_size, config.table_side, config.num_chunks) == (224, 16, 28, 4)
    assert (config.embed_dim, config.depth, config.num_heads) == (768, 12, 12)
    assert (config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads) == (512, 8, 16)
    assert (config.mlp_ratio, config.norm_eps, config.out_indices) == (4, 1e-6, (0, 2, 4, 6, 8))
    assert (config.image_mask, config.feature_mask) == ("noise", "noise")
    assert (config.image_step, config.feature_step) == (400, 600)
    assert (config.image_step_range, config.feature_step_range) == ((200, 600), (200, 1000))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_tiles_overlap_and_fit_its_table(name):
    config = PRESETS[name]
    assert config.tile_stride < config.tile_size <= 2 * config.image_size
    assert config.tile_stride % config.patch_size == 0


def test_presets_differ_from_the_released_network_only_where_named():
    base, small = PRESETS["impure_base_patch16_224"], PRESETS["impure_base_patch16_224_dec384"]
    assert base == IMPureConfig()
    changed = {k: v for k, v in small.to_dict().items() if v != base.to_dict()[k]}
    assert changed == {"decoder_embed_dim": 384, "decoder_num_heads": 12}


def test_official_options_are_translated():
    config = IMPureConfig.from_official(
        {
            "img_size": 32,
            "patch_size": 4,
            "embed_dim": 64,
            "depth": 3,
            "num_heads": 2,
            "decoder_embed_dim": 32,
            "decoder_depth": 2,
            "decoder_num_heads": 2,
            "mlp_ratio": 3,
            "chunks": 2,
            "out_indices": [0, 2],
            "img_mask": "mask",
            "feature_mask": "noise",
            "random_mask": False,
            "use_conv": False,
            "norm_eps": 1e-5,
        }
    )
    assert (config.image_size, config.num_chunks, config.out_indices) == (32, 2, (0, 2))
    assert (config.image_mask, config.feature_mask) == ("mask", "noise")
    assert (config.random_order, config.pixel_conv, config.norm_eps) == (False, False, 1e-5)
    assert (config.embed_dim, config.depth, config.mlp_ratio) == (64, 3, 3)


def test_official_options_of_losses_and_programs_are_passed_over():
    options = {"mask_chunks": 4, "norm_pix_loss": True, "lr": 1e-4, "data_path": "x", "pre_norm": True, "in_chans": 3}
    assert IMPureConfig.from_official(options) == IMPureConfig.from_official({})


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({}, 448),  # 28 cells, K=4
        ({"chunks": 3}, 432),  # 27 cells: 729 = 3 * 243
        ({"img_size": 24, "patch_size": 8, "chunks": 5}, 40),  # 5 of 6 cells
        ({"tile_size": 224, "tile_stride": 224}, 224),  # ours wins
    ],
)
def test_official_tile_is_the_largest_square_that_the_chunks_divide(options, side):
    assert IMPureConfig.from_official(options).tile_size == side


@pytest.mark.parametrize("options", [{"pre_norm": False}, {"in_chans": 1}], ids=str)
def test_official_networks_of_another_input_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        IMPureConfig.from_official(options)


def test_official_masks_of_another_word_are_refused():
    with pytest.raises(ConfigError, match="image_mask='blur'"):
        IMPureConfig.from_official({"img_mask": "blur"})
