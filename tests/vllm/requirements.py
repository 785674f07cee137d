"""Print what vLLM's wheel requires, but for torch and the packages that no build for this torch exists of.

python tests/vllm/requirements.py FOLDER      # the folder holds the wheel
"""

import email
import re
import sys
import zipfile
from pathlib import Path

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}


def requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as held:
        name = next(n for n in held.namelist() if n.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(held.read(name)).get_all("Requires-Dist") or []
    plain = [line for line in lines if "extra ==" not in line]
    return [line for line in plain if re.match(r"[\w.-]+", line)[0].lower() not in LEFT_OUT]


if __name__ == "__main__":
    print("\n".join(requirements(next(Path(sys.argv[1]).glob("*.whl")))))
