"""Print the requirements that pyproject.toml declares, one a line: the package's own, or those of an extra."""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extra = sys.argv[1] if len(sys.argv) > 1 else None
print("\n".join(project["optional-dependencies"][extra] if extra else project["dependencies"]))
