"""Packages are found, not listed; `verl_heddle.configs` lies at the top of the repository, because it is Hydra's and users' to read."""

from setuptools import find_namespace_packages, setup

NO_CODE = ("*.__pycache__", "*.__pycache__.*")

setup(
    packages=[
        "hydra_plugins",
        *find_namespace_packages(include=("verl_heddle", "verl_heddle.*"), exclude=NO_CODE),
        "verl_heddle.configs",
        *(f"verl_heddle.configs.{name}" for name in find_namespace_packages("configs", exclude=NO_CODE)),
    ],
    package_dir={"verl_heddle.configs": "configs"},
    package_data={"": ["*.yaml", "*.j2", "*.json", "*.gz", "*.md"]},
)
