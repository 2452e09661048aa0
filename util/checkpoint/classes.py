"""Classes of a checkpoint: their names and numbers, against the class folders of the images."""

from util.data.datasets import class_differences
from util.distributed import dist
from util.errors import UserError
from util.words import join_names


def refuse_other_classes(source: str, stored: dict[str, int] | None, current: dict[str, int] | None) -> None:
    """Raise a UserError where both are known and differ: the head would name the wrong classes."""
    if not stored or not current or stored == current:
        return
    differences = class_differences(list(stored), list(current), source, "--data_path")
    raise UserError(
        f"{source} was trained on other classes, and would name the wrong ones. "
        f"{differences or 'their order differs'}. Pass the --data_path, and the --class_names, that it was trained with"
    )


def resolve_class_names(source: str, checkpoint: dict, count: int, given: list[str] | None) -> list[str] | None:
    """Return the names of a classifier's classes in the order of their numbers.

    Args:
        source: Name of the checkpoint, for the message.
        checkpoint: Its contents; class_to_idx names the classes, where it is there.
        count: Number of the model's classes.
        given: Names of the file of --class_names, which take precedence; None: there is no such file.

    Returns:
        The names; None if neither the checkpoint nor the file has any.

    Raises:
        UserError: There are not as many names as classes, the checkpoint numbers its classes otherwise than from 0 on,
            or a name has another number there than in the file.
    """
    class_to_idx = checkpoint.get("class_to_idx") or {}
    stored = sorted(class_to_idx, key=class_to_idx.get) or None
    if given is None:
        if stored and sorted(class_to_idx.values()) != list(range(count)):
            raise UserError(
                f"{source} has {count} classes, and its class_to_idx does not give each number from 0 to {count - 1} "
                "to one name: name the classes with --class_names FILE"
            )
        return stored
    if len(given) != count:
        raise UserError(f"--class_names names {len(given)} classes, and {source} has {count}: name each of them")
    moved = [name for number, name in enumerate(given) if class_to_idx.get(name, number) != number]
    if moved:
        raise UserError(
            f"--class_names gives {join_names(moved, 3)} other numbers than {source}, which stores names of its own: "
            "omit --class_names"
        )
    return given


def match_classes(source: str, names: list[str] | None, folders: list[str], count: int) -> list[int]:
    """Return the number that each class folder's class has in a checkpoint.

    Args:
        source: Name of the checkpoint, for the messages.
        names: Names of its classes, in the order of their numbers; None: unknown.
        folders: Names of the class folders, sorted.
        count: Number of its classes.

    Raises:
        UserError: A folder is none of the classes; or the names are unknown, and there are not as many folders.
    """
    # By convention the numbers of released files, which name no classes, are those of the sorted folders.
    if names is None:
        if len(folders) != count:
            raise UserError(
                f"--data_path has {len(folders)} class folders in val/, and {source} has {count} classes without "
                "names: name them with --class_names FILE, one per line; without it class k is taken to be the k-th "
                f"folder, so that there must be {count}, some of which may be empty"
            )
        dist.print_rank0(f"notice: {source} names no classes: class k is taken to be the k-th folder of val/, sorted")
        return list(range(count))

    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise UserError(
            f"{source} was trained on other classes: {class_differences(names, folders, source, '--data_path')}. Pass "
            "a --data_path whose class folders are among its classes"
        )
    if len(folders) < count:
        dist.print_rank0(f"notice: {len(folders)} of the {count} classes are evaluated, and only their logits count")
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[name] for name in folders]
