"""Files of class names, in the forms that people have them."""

import json
import os
from collections import Counter
from pathlib import Path

from util.errors import UserError
from util.words import join_names

FORMS = "it must hold one name per line, or JSON as timm or Hugging Face write it"  # for messages


def read_class_names(file: str | Path) -> list[str]:
    """Read the names of classes in the order of the classes' numbers.

    The file holds one name per line, or JSON: a list of names; a configuration of timm (label_names) or Hugging Face
    (id2label); an object from number to name, or to a list that begins with the name; or one from name to number.

    Args:
        file: The file, in UTF-8.

    Raises:
        UserError: It can't be read, holds something else, or numbers or names are missing or occur twice.
    """
    try:
        content = Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"--class_names {file}: {error.strerror}; name a file of class names") from error
    text = os.fsdecode(content).strip()  # as the names of folders are decoded
    try:
        names = _from_json(json.loads(text)) if text[:1] in ("[", "{") else [line.strip() for line in text.splitlines()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"--class_names {file} can't be used: {error}; {FORMS}") from error

    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or "" in names:
        raise UserError(f"--class_names {file} holds {'an empty name' if names else 'nothing'}: {FORMS}")
    if repeated:
        raise UserError(f"--class_names {file} names classes twice: {join_names(repeated, 3)}")
    return names


def _from_json(content: object) -> list[str]:
    """Return the names that one of the forms of JSON holds.

    Raises:
        ValueError: It is none of them.
    """
    if isinstance(content, dict):
        pretrained = content.get("pretrained_cfg")
        inner = pretrained if isinstance(pretrained, dict) else {}
        content = content.get("label_names") or inner.get("label_names") or content.get("id2label") or content
    if isinstance(content, dict) and all(isinstance(number, int) for number in content.values()):
        if len(set(content.values())) < len(content):
            raise ValueError("two of its names have the same number")
        content = {number: name for name, number in content.items()}
    if isinstance(content, dict):
        content = _in_order(content)
    if not isinstance(content, list):
        raise ValueError("it holds no list of names")
    names = [entry[0] if isinstance(entry, list) and entry else entry for entry in content]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("it holds other things than names")
    return [name.strip() for name in names]


def _in_order(by_number: dict) -> list:
    """Return the values of an object whose keys are the numbers from 0 on, in their order.

    Raises:
        ValueError: A key is no number, or one is missing.
    """
    values = {int(number): value for number, value in by_number.items()}
    if sorted(values) != list(range(len(by_number))):
        raise ValueError(f"its {len(by_number)} classes do not have the numbers from 0 to {len(by_number) - 1}")
    return [values[number] for number in range(len(values))]
