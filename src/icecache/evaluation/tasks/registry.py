"""All tasks by name, and the groups of them."""

from icecache.errors import InputError
from icecache.evaluation.tasks.base import Task
from icecache.evaluation.tasks.gsm8k import gsm8k_task
from icecache.evaluation.tasks.longbench import CHINESE, longbench_tasks
from icecache.evaluation.tasks.passkey import passkey_task
from icecache.evaluation.tasks.ruler_needles import needle_tasks
from icecache.evaluation.tasks.ruler_qa import qa_tasks
from icecache.evaluation.tasks.ruler_words import word_tasks

__all__ = ["all_tasks", "find_tasks", "task_groups"]


def all_tasks() -> dict[str, Task]:
    """Return every task by name."""
    tasks = [*longbench_tasks(), *needle_tasks(), *word_tasks(), *qa_tasks()]
    return {task.name: task for task in [*tasks, passkey_task(), gsm8k_task()]}


def task_groups() -> dict[str, list[str]]:
    """Return the names of each group's tasks; ``generated`` ones need no data."""
    tasks = all_tasks().values()
    longbench = [task.name for task in tasks if task.group == "longbench"]
    made = [t.name for t in tasks if t.is_generated and t.name not in ("ruler_qa_1", "ruler_qa_2")]
    return {
        "longbench": longbench,
        "longbench_en": [name for name in longbench if name not in CHINESE],
        "longbench_zh": [name for name in longbench if name in CHINESE],
        "ruler": [task.name for task in tasks if task.group == "ruler"],
        "generated": made,
        "all": [task.name for task in tasks],
    }


def find_tasks(names: list[str]) -> list[Task]:
    """Return the tasks that names of tasks and groups stand for, each once, in the order given.

    Raises
    ------
    InputError
        On an unknown name, or none at all.
    """
    tasks, groups = all_tasks(), task_groups()
    known = f"known: {', '.join(tasks)}; groups: {', '.join(groups)}"
    if not names:
        raise InputError(f"no task given; {known}")
    found: dict[str, Task] = {}
    for name in names:
        if name not in tasks and name not in groups:
            raise InputError(f"unknown task {name!r}; {known}")
        for one in groups.get(name, [name]):
            found[one] = tasks[one]
    return list(found.values())
