"""Set-up of acam-kd."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

EXPORT = ["onnx", "onnxruntime", "onnxscript"]
LIGHTNING = "lightning>=2.6,!=2.6.2,!=2.6.3"  # those two were compromised (GHSA-w37p-236h-pfx3)

setup(
    name="acam-kd",
    version="0.2.0",
    description="Knowledge distillation for dense prediction, on torchvision and Detectron2",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "projects"},
    packages=find_packages("projects"),
    package_data={"acam_kd": ["py.typed", "report/*.html"]},
    entry_points={"console_scripts": ["acam-kd = acam_kd.cli:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6,!=2.13.0",
        "torchvision",
        "fvcore",
        "iopath",
        "pyyaml",
        "yacs",
        "pycocotools",
        "opencv-python",
        "numpy",
        "safetensors",
        "tensorboard",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        # acam-kd export --format onnx; the other formats need nothing.
        "export": EXPORT,
        # For `acam-kd train` and the demo; Detectron2 and acam_kd.distill do without.
        "lightning": [LIGHTNING],
        # Its networks as trunks of detectors: --student fcos_timm:tf_efficientnet_lite0_fpn.
        "timm": ["timm>=1.0.31"],
        # Detectron2 is not on the package index; README.md, Set-up. timm: its ViT imports it, and is tested.
        # scikit-learn: its digits are the data of configs/compare/digits.yaml.
        "dev": [
            LIGHTNING,
            *EXPORT,
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "timm",
            "scikit-learn",
        ],  # fmt: skip
        "docs": ["sphinx", "myst-parser", "furo"],
    },
)
