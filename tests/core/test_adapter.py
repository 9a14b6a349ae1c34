"""The adapter of any module: levels by path, what they are measured by, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import acam_kd
from acam_kd.core import FeatureSpec, FrozenTeacher, ModuleAdapter, Targets

from .detectors import Backbone, Detector, refused


class CNN(nn.Module):
    """A classifier with layers of strides 4, 8 and 16."""

    def __init__(self, channels=4):
        super().__init__()
        self.layer1 = nn.Conv2d(3, channels, 3, stride=4, padding=1)
        self.layer2 = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.BatchNorm2d(2 * channels)
        )
        self.layer3 = nn.Sequential(nn.Conv2d(2 * channels, 4 * channels, 3, stride=2, padding=1), nn.Dropout())
        self.fc = nn.Linear(4 * channels, 5)

    def forward(self, images):
        return self.fc(self.layer3(self.layer2(self.layer1(images))).mean((2, 3)))


class Transformer(nn.Module):
    """A map of patches as tokens behind some leading ones, for images of all sizes."""

    def __init__(self, leading=1, patch=16, channels=6):
        super().__init__()
        self.leading, self.patch = nn.Parameter(torch.randn(1, leading, channels)), patch
        self.embed = nn.Conv2d(3, channels, patch, stride=patch)
        self.block = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.Dropout())
        self.head = nn.Linear(channels, 5)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return self.head(self.block(torch.cat([self.leading.expand(len(images), -1, -1), tokens], 1)).mean(1))


def features(adapter, batch):
    """Return a teacher's features of a batch, as this adapter extracts them."""
    return FrozenTeacher(adapter.network(adapter.offered)[0], None, adapter.network(adapter.offered)[1])(batch)


def step(adapter, batch):
    """Return a student's features, as its taps recorded them."""
    reader = adapter.reader(adapter.offered)
    reader.arm()
    adapter.model(batch)
    read = reader.read((batch,), {})
    reader.remove()
    return read.features


def by_hand(tokens, leading, height, width):
    """Tokens as a map, one position after the other."""
    folded = torch.full((tokens.shape[0], tokens.shape[2], height, width), float("nan"))
    for n in range(len(tokens)):
        for y in range(height):
            for x in range(width):
                folded[n, :, y, x] = tokens[n, leading + y * width + x]
    return folded


# Levels by path.


def test_levels_of_a_cnn_have_measured_channels_and_strides():
    adapter = ModuleAdapter(CNN(), {"c2": "layer1", "c3": "layer2.0", "c4": "layer3"})
    assert adapter.offered == ("backbone",) and adapter.name == "CNN"
    assert adapter.levels(["backbone"]) == {"c2": FeatureSpec(4, 4), "c3": FeatureSpec(8, 8), "c4": FeatureSpec(16, 16)}
    assert adapter.levels(["logits"]) == {}


def test_levels_are_the_outputs_of_the_submodules():
    model, batch = CNN().eval(), torch.randn(2, 3, 64, 96)
    c2 = model.layer1(batch)
    want = {"c2": c2, "c4": model.layer3(model.layer2(c2))}
    adapter = ModuleAdapter(model, {"c2": "layer1", "c4": "layer3"})
    for got in (features(adapter, batch), step(adapter, batch)):
        assert list(got) == ["c2", "c4"] and all(torch.equal(got[name], want[name]) for name in want)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_backbone_that_returns_maps_by_name_needs_no_paths():
    model, batch = Detector().eval(), torch.randn(2, 3, 16, 32)
    adapter = ModuleAdapter(model)
    assert adapter.offered == ("backbone",) and adapter.levels(["backbone"]) == {"p3": FeatureSpec(4, 8)}
    want = model.backbone(batch)["p3"]
    assert torch.equal(features(adapter, batch)["p3"], want) and torch.equal(step(adapter, batch)["p3"], want)
    assert adapter.network(["backbone"])[0] is model.backbone  # the head does not run


@pytest.mark.parametrize("leading", [0, 1, 5])
@pytest.mark.parametrize(("patch", "side"), [(16, 224), (14, 224), (8, 64)])
def test_tokens_are_folded_position_by_position(leading, patch, side):
    model = Transformer(leading, patch).eval()
    adapter = ModuleAdapter(model, {"c4": "block"}, example_inputs=torch.zeros(1, 3, side, side))
    assert adapter.levels(["backbone"]) == {"c4": FeatureSpec(6, patch)}
    batch, tokens = torch.randn(2, 3, side, side), []
    handle = model.block.register_forward_hook(lambda module, args, out: tokens.append(out))
    model(batch)
    handle.remove()
    want = by_hand(tokens[0], leading, side // patch, side // patch)
    assert torch.equal(features(adapter, batch)["c4"], want)
    assert torch.equal(step(adapter, batch)["c4"], want)


@pytest.mark.parametrize("leading", [0, 1, 5])
@pytest.mark.parametrize("size", [(64, 96), (320, 32), (224, 224)])
def test_another_size_at_run_time_than_at_measuring(leading, size):
    """Where positions of a token are mixed up, the map is not that of the patches."""
    model = Transformer(leading).eval()
    model.block = nn.Identity()
    adapter = ModuleAdapter(model, {"c4": "block"})
    batch = torch.randn(2, 3, *size)
    patches = model.embed(batch)
    assert patches.shape[2:] == (size[0] // 16, size[1] // 16)
    assert torch.equal(features(adapter, batch)["c4"], patches) and torch.equal(step(adapter, batch)["c4"], patches)


def test_measuring_by_an_oblong_example():
    model = Transformer(5).eval()
    model.block = nn.Identity()
    adapter = ModuleAdapter(model, {"c4": "block"}, example_inputs=torch.zeros(1, 3, 32, 112))
    batch = torch.randn(1, 3, 112, 32)
    assert adapter.levels(["backbone"]) == {"c4": FeatureSpec(6, 16)}
    assert torch.equal(features(adapter, batch)["c4"], model.embed(batch))


def test_sides_that_are_no_multiple_of_a_patch_are_refused():
    adapter = ModuleAdapter(Transformer(1), {"c4": "block"})
    found = "4 tokens at block, 1 leading ones left out"
    with refused("levels", found, "3 x 2 for 46 x 32 pixels", "multiples of the size of a patch"):
        features(adapter, torch.zeros(1, 3, 46, 32))


@pytest.mark.parametrize(("size", "taken"), [((46, 32), (48, 32)), ((96, 7), (96, 16)), ((64, 96), (64, 96))])
def test_a_teachers_images_are_resized_to_the_nearest_multiples_of_its_patches(size, taken):
    model = Transformer(1).eval()
    model.block = nn.Identity()
    adapter = ModuleAdapter(model, {"c4": "block"}, role="teacher")
    batch = torch.rand(2, 3, *size)
    got = features(adapter, batch)["c4"]
    seen = nn.functional.interpolate(batch, taken, mode="bilinear", antialias=True)
    assert torch.equal(got, model.embed(batch if size == taken else seen))


@pytest.mark.parametrize("side", [224, 64])
def test_channels_may_come_last_and_tokens_first(side):
    """Swin's stages are (N, H, W, C), torch's own transformer is (L, N, C)."""
    last = Gives(lambda x: x[:, :, ::4, ::4].repeat(1, 24, 1, 1).permute(0, 2, 3, 1))
    first = Gives(lambda x: x[:, :, ::8, ::8].flatten(2).permute(2, 0, 1))
    example = torch.rand(1, 3, side, side)
    for model, spec in ((last, FeatureSpec(96, 4)), (first, FeatureSpec(4, 8))):
        adapter = ModuleAdapter(model, {"c": "part"}, example_inputs=example, role="teacher")
        assert adapter.levels(["backbone"]) == {"c": spec}
        batch = torch.rand(2, 3, 32, 48)
        want = model.conv(batch)[:, :, :: spec.stride, :: spec.stride].repeat(1, spec.channels // 4, 1, 1)
        assert torch.equal(features(adapter, batch)["c"], want)


def test_an_output_that_is_no_tensor_in_training_is_named():
    model = Gives(lambda x: {"out": x} if model.training else x)
    model.training = True
    adapter = ModuleAdapter(model, {"c1": "part"})
    with refused("levels", "a dict at part", "a tensor, as on the example", "in training and in evaluation"):
        step(adapter, torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("level", ["logits", "classes"])
def test_outputs_of_a_classifier_are_predictions(level):
    model, batch = CNN().eval(), torch.randn(3, 3, 32, 32)
    adapter = ModuleAdapter(model, {"c4": "layer3", level: "fc"})
    assert adapter.offered == ("backbone", "classes")
    assert adapter.levels(["classes"]) == {level: FeatureSpec(5, 0, logits=True)}
    for got in (features(adapter, batch), step(adapter, batch)):
        assert torch.equal(got[level], model(batch)[..., None, None]) and got["c4"].shape == (3, 16, 2, 2)
    assert list(adapter.network(["classes"])[1](model, batch)) == [level]  # what is not asked for is not tapped


def test_a_map_of_predictions_is_the_level_of_logits():
    model = Detector().eval()
    adapter = ModuleAdapter(model, {"p3": "backbone.norm", "logits": "head"})
    assert adapter.offered == ("backbone", "logits")
    assert adapter.levels(["logits"]) == {"logits": FeatureSpec(2, 8, logits=True)}


def test_a_classifier_learns_from_a_classifier():
    student, teacher, batch = CNN(), CNN(8), torch.randn(4, 3, 32, 32)
    levels = {"logits": "fc"}
    acam_kd.distill(student, teacher, method="KD", student_levels=levels, teacher_levels=levels)
    student(batch)
    loss = student.distillation.losses["loss_kd_kl"]
    assert loss > 0
    loss.backward()
    assert student.fc.weight.grad.abs().sum() > 0 and student.layer1.weight.grad.abs().sum() > 0
    student, labels = CNN(), torch.tensor([0, 1, 2, 4])
    targets = lambda images: Targets(labels={"logits": labels[:, None, None]})  # noqa: E731
    acam_kd.distill(student, teacher, method="DKD", student_levels=levels, teacher_levels=levels, targets=targets)
    student(batch)
    assert all(loss.isfinite() for loss in student.distillation.losses.values())


def test_a_cnn_learns_from_a_transformer():
    student, teacher, batch = CNN(), Transformer(5), torch.randn(2, 3, 64, 96)
    kind = {"student_levels": {"c4": "layer3"}, "teacher_levels": {"last": "block"}}
    acam_kd.distill(student, teacher, method="Mimic", **kind)
    assert student.distillation.levels == {"c4": "last"}
    student(batch)
    sum(student.distillation.losses.values()).backward()
    assert student.layer1.weight.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())


# What they are measured by.


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(2, 1, 32, 32),
        (torch.zeros(2, 1, 32, 32), True),
        [torch.zeros(2, 1, 32, 32)],
        {"flag": False, "images": torch.zeros(2, 1, 32, 32)},
    ],
    ids=["batch", "arguments", "list", "by name"],
)
def test_an_example_is_a_batch_or_the_arguments(example):
    class Grey(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)

        def forward(self, images, flag=False):
            return self.conv(images)

    adapter = ModuleAdapter(Grey(), {"c1": "conv"}, example_inputs=example)
    assert adapter.levels(["backbone"]) == {"c1": FeatureSpec(4, 2)}


def test_noise_has_the_type_of_the_model():
    assert ModuleAdapter(CNN().double(), {"c2": "layer1"}).levels(["backbone"]) == {"c2": FeatureSpec(4, 4)}
    assert ModuleAdapter(CNN().to("meta"), {"c2": "layer1"}).levels(["backbone"]) == {"c2": FeatureSpec(4, 4)}


class Noisy(Backbone):
    """Draws random numbers whatever its mode is."""

    def forward(self, batch):
        return super().forward(batch + torch.rand(()))


@pytest.mark.parametrize("paths", [None, {"p3": "backbone.norm"}])
def test_measuring_changes_nothing(paths):
    model = Detector()
    model.backbone = Noisy()
    model.backbone.norm.eval()
    modes = [module.training for module in model.modules()]
    state = {name: x.clone() for name, x in model.state_dict().items()}
    attributes, random = dict(model.__dict__), torch.get_rng_state()
    adapter = ModuleAdapter(model, paths)
    assert adapter.levels(["backbone"]) == {"p3": FeatureSpec(4, 8)}
    assert [module.training for module in model.modules()] == modes == [True, True, True, False, True]
    assert torch.equal(torch.get_rng_state(), random) and model.__dict__ == attributes
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_measuring_that_fails_changes_nothing_either():
    model = CNN()
    model.layer2.eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    with refused("example_inputs"):
        ModuleAdapter(model, {"c2": "layer1", "c3": "layer2"}, example_inputs=torch.zeros(1, 2, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


# What is refused.


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_wrong_path_is_refused_with_those_near_it(role):
    argument = f"{role}_levels"
    with refused(argument, "c4: layer3.7", "a submodule, as layer3, layer3.0, layer3.1"):
        ModuleAdapter(CNN(), {"c2": "layer1", "c4": "layer3.7"}, role=role)
    with refused(argument, "c2: layer2.l", "a submodule, as layer2, layer2.0, layer2.1"):
        ModuleAdapter(CNN(), {"c2": "layer2.l"}, role=role)
    with refused(argument, "c4: stages", "a submodule, as layer1, layer2, layer3, fc"):
        ModuleAdapter(CNN(), {"c4": "stages"}, role=role)
    with refused(argument, "c4: ", "a submodule, as layer1"):
        ModuleAdapter(CNN(), {"c4": ""}, role=role)
    kind = {f"{r}_levels": {"c4": "layer9" if r == role else "layer3"} for r in ("student", "teacher")}
    with refused(argument, "c4: layer9"):
        acam_kd.distill(CNN(), CNN(), method="PKD", **kind)


class Gives(nn.Module):
    """Has a part that returns something of the example's shape."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.part = nn.Conv2d(3, 4, 1), nn.Identity()
        self.make = make

    def forward(self, batch):
        self.part(self.make(self.conv(batch)))
        return batch


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda x: (x, x), "a tuple"),
        (lambda x: {"out": x}, "a dict"),
        (lambda x: None, "nothing"),
        (lambda x: x.mean(), "a tensor ()"),
        (lambda x: x[None], "a tensor (1, 1, 4, 224, 224)"),
        (lambda x: x.flatten(2).transpose(1, 2)[:, :1000], "a tensor (1, 1000, 4)"),  # no number of patches
        (lambda x: x[:, :, ::4, ::16], "a tensor (1, 4, 56, 14)"),  # not the proportions of the image
        (lambda x: x[:, :, ::4, ::4].repeat(4, 1, 1, 1), "a tensor (4, 4, 56, 56)"),  # windows of it
    ],
    ids=["tuple", "dict", "None", "0-d", "5-d", "no tokens", "other proportions", "windows"],
)
def test_an_output_that_is_no_map_is_refused(make, found):
    with refused(
        "teacher_levels",
        f"c1: part, which gives {found}",
        "(N, C, H, W), (N, H, W, C), tokens (N, L, C) or (N, K)",
        "a submodule below",
    ):
        ModuleAdapter(Gives(make), {"c1": "part"}, role="teacher")


def test_a_part_of_an_output_is_named_by_its_key_or_index():
    """Maps (N, C, H, W) and tokens of a tuple or a dict."""
    tokens = Gives(lambda x: (x, x[:, :, ::4, ::4].flatten(2).transpose(1, 2)))
    adapter = ModuleAdapter(tokens, {"c1": "part[0]", "c2": "part[1]"}, role="teacher")
    shapes = adapter.levels(["backbone"])
    assert {k: (s.channels, s.stride) for k, s in shapes.items()} == {"c1": (4, 1), "c2": (4, 4)}
    network, extract = adapter.network(["backbone"])
    found = extract(network, torch.rand(2, 3, 32, 48))
    assert found["c1"].shape == (2, 4, 32, 48) and found["c2"].shape == (2, 4, 8, 12)
    adapter = ModuleAdapter(Gives(lambda x: {"out": x}), {"c1": "part[out]"})
    assert list(adapter.levels(["backbone"])) == ["c1"]
    both = {"student_levels": {"c1": "part[out]"}, "teacher_levels": {"c1": "part[0]"}}
    student = acam_kd.distill(Gives(lambda x: {"out": x}), Gives(lambda x: [x]), method="PKD", **both)
    student.train()(torch.rand(2, 3, 16, 16))
    (loss,) = student.distillation.losses.values()
    loss.backward()
    assert student.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "path", "hint"),
    [
        (lambda x: (x, x), "part", "a part of its output: part[0], part[1]"),
        (lambda x: {"out": x, "aux": x}, "part", "a part of its output: part[out], part[aux]"),
        (lambda x: (x, x), "part[2]", "a part of its output: part[0], part[1]"),
        (lambda x: x.flatten(2).transpose(1, 2)[:, :1000], "part", "1000 tokens, 0 to 32 leading ones left out"),
    ],
    ids=["tuple", "dict", "wrong index", "tokens"],
)
def test_what_to_name_instead_is_said(make, path, hint):
    with refused("teacher_levels", f"c1: {path}", hint=hint):
        ModuleAdapter(Gives(make), {"c1": path}, role="teacher")


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(12)))


def test_names_near_a_wrong_path_are_those_of_its_depth():
    for named, near in (("blocks.12", "blocks.11"), ("block.3.0", "blocks.3.0"), ("blocks.3.relu", "blocks.3.1")):
        with refused("teacher_levels", f"c4: {named}", "a submodule, as ") as error:
            ModuleAdapter(Blocks(), {"c4": named}, role="teacher")
        listed = error.value.allowed.removeprefix("a submodule, as ").split(", ")
        assert near in listed and len(listed) <= 8
        assert all(name.count(".") <= named.count(".") for name in listed)


@pytest.mark.parametrize("argument", ["student_levels", "teacher_levels"])
def test_a_path_is_text(argument):
    levels = {"student_levels": {"c4": "layer3"}, "teacher_levels": {"c4": "layer3"}} | {argument: {"c4": 3}}
    with refused(argument, "c4: 3", "the path of a submodule"):
        acam_kd.distill(CNN(), CNN(), method="PKD", **levels)


def test_strides_of_sides_that_are_no_multiples_are_maps_nevertheless():
    example = torch.zeros(1, 3, 50, 75)
    adapter = ModuleAdapter(CNN(), {"c2": "layer1", "c3": "layer2", "c4": "layer3"}, example_inputs=example)
    assert [spec.channels for spec in adapter.levels(["backbone"]).values()] == [4, 8, 16]


def test_a_part_that_does_not_run_once_is_refused():
    class Unused(CNN):
        def forward(self, images):
            return self.layer1(images)

    class Twice(CNN):
        def forward(self, images):
            return self.layer1(images), self.layer1(images)

    with refused("teacher_levels", "c4: layer3, which does not run on the example", "one call"):
        ModuleAdapter(Unused(), {"c4": "layer3"}, role="teacher")
    with refused("student_levels", "c2: layer1, which runs more than once on the example", "one call"):
        ModuleAdapter(Twice(), {"c2": "layer1"})


def test_an_example_that_the_model_refuses_is_named():
    found = "(1, 2, 32, 32), on which a CNN fails: Given groups=1"
    with refused("example_inputs", found, "inputs that it takes"):
        ModuleAdapter(CNN(), {"c2": "layer1"}, example_inputs=torch.zeros(1, 2, 32, 32))
    with refused("example_inputs", "(1, 3, 32, 32), on which a CNN fails: ", "inputs that it takes"):
        ModuleAdapter(CNN(), {"c2": "layer1"}, example_inputs={"pixels": torch.zeros(1, 3, 32, 32)})
    with refused("example_inputs", "(1, 2, 32, 32), on which a Detector fails: "):
        ModuleAdapter(Detector(), example_inputs=torch.zeros(1, 2, 32, 32)).levels(["backbone"])
    with refused("example_inputs", "Tensor", "a batch (N, C, H, W) among the arguments"):
        ModuleAdapter(CNN(), {"c2": "layer1"}, example_inputs=torch.zeros(3, 32, 32))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_module_of_no_known_kind_needs_paths(role):
    hint = "CNN is of no known kind and has no backbone; its parts are layer1, layer2, layer3, fc"
    with refused(f"{role}_levels", "nothing", "level name -> path of a submodule", hint):
        ModuleAdapter(CNN(), role=role)
    models = {"student": Detector(), "teacher": Detector(), role: CNN()}
    with refused(f"{role}_levels", "nothing", "level name -> path of a submodule", hint):
        acam_kd.distill(**models, method="PKD")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_backbone_without_names_needs_paths(role):
    model = Detector()
    model.backbone = nn.Conv2d(3, 4, 1)
    found, hint = "nothing, and a Tensor from the backbone of a Detector", f"{role}_levels={{'c4': 'backbone.layer3'}}"
    with refused(f"{role}_levels", found, "level name -> path of a submodule", hint):
        ModuleAdapter(model, role=role).levels(["backbone"])


def test_no_levels_at_all_are_refused():
    with refused("student_levels", "nothing", "level name -> path of a submodule"):
        ModuleAdapter(CNN(), {})
