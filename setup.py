from setuptools import setup

SUBPACKAGES = ["meta", "update", "ops", "reference", "teacher", "data", "evaluation", "report"]

setup(
    packages=["gdprompt_fast", *(f"gdprompt_fast.{name}" for name in SUBPACKAGES)],
    package_data={"gdprompt_fast": ["py.typed"]},
)
