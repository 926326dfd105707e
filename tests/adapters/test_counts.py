import pytest

from lightning_automl.adapters.counts import (
    attention_parameters,
    conv_adapter_parameters,
    conv_lora_parameters,
    lora_parameters,
)


def test_the_table_of_a_transformer_of_1024_features_and_24_blocks():
    count = attention_parameters(width=1024, blocks=24, rank=16, tasks=2)
    assert (count.matrix, count.adapter_matrix) == (1_048_576, 32_768)
    assert (count.full, count.adapter) == (100_663_296, 3_145_728)
    assert count.ratio == 32 == 1024 / (2 * 16)
    assert count.stored_by_adapters == 106_954_752
    assert count.stored_in_full == 201_326_592
    assert attention_parameters(1024, 24, 16).stored_by_adapters == 103_809_024


def test_a_linear_layer_by_hand():
    assert lora_parameters(in_features=5, out_features=3, rank=2) == 2 * 5 + 3 * 2


def test_both_forms_of_a_convolution_by_hand():
    assert conv_lora_parameters(64, 128, 3, rank=8) == 8 * 64 * 9 + 128 * 8 == 5632 < 128 * 64 * 9 == 73_728
    assert conv_lora_parameters(64, 128, 3, rank=8, form="matrix") == (8 * 3) * (64 * 3) + (128 * 3) * (8 * 3) == 13_824
    assert conv_lora_parameters(64, 128, (1, 3), rank=8) == 8 * 64 * 3 + 128 * 8


def test_a_depthwise_adapter_is_no_smaller_than_its_layer():
    assert conv_lora_parameters(32, 32, 3, rank=1, groups=32, form="weight") == 32 + 9
    assert conv_lora_parameters(32, 32, 3, rank=8, groups=32, form="weight") == 8 * (32 + 9) > 32 * 9


def test_a_conv_adapter_by_hand():
    assert conv_adapter_parameters(256, 256, 3, compression=8) == 11_040
    assert conv_adapter_parameters(256, 256, 3, scale_parameters="layer") == 11_040 - 256 + 1
    assert conv_adapter_parameters(256, 256, 3, scale_parameters="none") == 11_040 - 256
    # 4 to 2 channels, a kernel 1 x 3 sees 2 of them, then 2 to 3 channels, each with a bias, and 3 scales
    assert conv_adapter_parameters(4, 3, (1, 3), compression=2) == 2 * (2 * 3) + 2 + 2 * 3 + 3 + 3


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (lambda: lora_parameters(4, 4, 0), "rank is 0; it is a whole number of 1 or more"),
        (lambda: lora_parameters(4, 4, 1.5), "rank is 1.5"),
        (lambda: attention_parameters(8, 0, 1), "blocks is 0"),
        (
            lambda: conv_lora_parameters(6, 4, 3, 1, groups=4, form="weight"),
            "groups is 4; it must divide in_channels, 6",
        ),
        (lambda: conv_lora_parameters(4, 4, 3, 1, groups=4), "groups is 4, but the form composition takes 1"),
        (lambda: conv_lora_parameters(4, 4, (1, 3), 1, form="matrix"), "kernel_size is 1 x 3"),
        (lambda: conv_lora_parameters(4, 4, 3, 1, form="tucker"), "known: composition, weight, matrix"),
        (lambda: conv_adapter_parameters(12, 12, compression=8), "compression is 8; it must divide in_channels, 12"),
        (lambda: conv_adapter_parameters(4, 4, compression=8), "compression is 8; it must divide"),
        (lambda: conv_adapter_parameters(8, 8, scale_parameters="all"), "known: channel, layer, none"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(count, message):
    with pytest.raises(ValueError, match=message):
        count()
