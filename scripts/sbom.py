#!/usr/bin/env python3
"""What is in a wheel, or in an environment? Writes a bill of materials (SBOM), CycloneDX 1.6 in JSON.

usage: python3 scripts/sbom.py WHEEL                  what the wheel declares: its dependencies with their ranges
       python3 scripts/sbom.py --environment          what is installed beside this interpreter, with versions

The same input gives the same bytes. The date is SOURCE_DATE_EPOCH, or else there is none. Standard library alone.
"""

import argparse
import email
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import uuid
import zipfile
from collections.abc import Iterable
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path
from typing import Any

SPEC = "1.6"
NAMESPACE = uuid.UUID("5b3f5a5c-3a76-4f6e-9a0c-3f1f9f3b8f10")  # of our serial numbers; any that stays the same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path)
    parser.add_argument("--environment", action="store_true", help="all distributions beside this interpreter")
    args = parser.parse_args()
    if (args.wheel is None) == (not args.environment):
        parser.error("name a wheel, or say --environment")
    given = os.environ.get("SOURCE_DATE_EPOCH")
    epoch = int(given) if given else None
    sys.stdout.write(of_environment(epoch) if args.environment else of_wheel(args.wheel, epoch))
    return 0


def of_wheel(wheel: Path, epoch: int | None) -> str:
    """The bill of one wheel: itself with its sum, and what it requires, by extra."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        about = email.message_from_bytes(archive.read(metadata))
    subject = component(about) | {"hashes": [{"alg": "SHA-256", "content": sha256(wheel)}]}
    required = {c["bom-ref"]: c for c in map(requirement, about.get_all("Requires-Dist") or ())}
    return bill(subject, required.values(), {subject["bom-ref"]: sorted(required)}, epoch)


def of_environment(epoch: int | None) -> str:
    """The bill of an environment: all that is installed, and which of it needs which."""
    found = {normal(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    components = {name: component(d.metadata) for name, d in found.items()}
    needs = {
        components[name]["bom-ref"]: sorted({components[n]["bom-ref"] for n in needed(d) if n in components})
        for name, d in found.items()
    }
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    subject = {"type": "platform", "bom-ref": f"python@{python}", "name": "python", "version": python}
    return bill(subject, components.values(), needs, epoch)


def needed(distribution: importlib.metadata.Distribution) -> set[str]:
    """Names of what a distribution requires without extras."""
    return {normal(words(r)[0]) for r in distribution.requires or () if "extra ==" not in r}


def bill(
    subject: dict[str, Any], components: Iterable[dict[str, Any]], needs: dict[str, list[str]], epoch: int | None
) -> str:
    """The document. Its serial number follows from its content."""
    listed = sorted(components, key=lambda c: str(c["bom-ref"]))
    metadata: dict[str, Any] = {"component": subject}
    if epoch is not None:
        metadata["timestamp"] = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    content = {
        "metadata": metadata,
        "components": listed,
        "dependencies": [{"ref": ref, "dependsOn": needs[ref]} for ref in sorted(needs)],
    }
    serial = uuid.uuid5(NAMESPACE, json.dumps(content, sort_keys=True))
    head = {"bomFormat": "CycloneDX", "specVersion": SPEC, "serialNumber": f"urn:uuid:{serial}", "version": 1}
    return json.dumps(head | content, indent=2, ensure_ascii=False) + "\n"


def component(about: "Message | importlib.metadata.PackageMetadata") -> dict[str, Any]:
    """One distribution, by its metadata."""
    name, version = normal(str(about["Name"])), str(about["Version"])
    found: dict[str, Any] = {"type": "library", "bom-ref": f"{name}@{version}", "name": name, "version": version}
    licence = about.get("License-Expression")
    if licence:
        found["licenses"] = [{"expression": str(licence)}]
    elif text := licence_name(about):
        found["licenses"] = [{"license": {"name": text}}]
    if not name.startswith("ai-dynamo"):  # those names lead to others' packages there
        found["purl"] = f"pkg:pypi/{name}@{version}"
    return found


def licence_name(about: "Message | importlib.metadata.PackageMetadata") -> str:
    """What older metadata says of the licence, where that is a name and not the whole text."""
    for classifier in about.get_all("Classifier") or ():
        if classifier.startswith("License :: ") and classifier.count("::") > 1:
            return str(classifier.rpartition(":: ")[2])
    text = str(about.get("License") or "").strip()
    return text if len(text) < 100 and "\n" not in text else ""


def requirement(line: str) -> dict[str, Any]:
    """What `aiohttp>=3.11; extra == "x"` asks for: no version, but its range and extra."""
    name, extras, span, extra = words(line)
    properties = [{"name": "dynamo:range", "value": span or "any"}]
    if extras:
        properties.append({"name": "dynamo:extras", "value": extras})
    if extra:
        properties.append({"name": "dynamo:for-extra", "value": extra})
    return {
        "type": "library",
        "bom-ref": f"{normal(name)}{span}" + (f"#{extra}" if extra else ""),
        "name": normal(name),
        "scope": "optional" if extra else "required",
        "purl": f"pkg:pypi/{normal(name)}",
        "properties": properties,
    }


def words(line: str) -> tuple[str, str, str, str]:
    """Name, extras, range, and for which extra, of a requirement as metadata has it."""
    found = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?$", line)
    if found is None:
        raise ValueError(f"{line!r} is not a requirement")
    name, extras, span, marker = (part or "" for part in found.groups())
    extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
    return name, extras, span.strip(), extra[1] if extra else ""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
