"""The suite of tasks: real reviews, sentences made by rule, digits from scratch, and tasks of a hub."""

from zo_hf.comparison.suite.acceptability import acceptability
from zo_hf.comparison.suite.by_rule import made_by
from zo_hf.comparison.suite.entailment import entailment
from zo_hf.comparison.suite.hub import copa_question, from_hub
from zo_hf.comparison.suite.numbers import more
from zo_hf.comparison.suite.questions import question
from zo_hf.comparison.suite.reviews import sentiment, source, viewers
from zo_hf.comparison.suite.task import Parts, Sizes, TextTask
from zo_hf.tasks.prompts import PROMPT_A

#: Tasks that need no hub.
OFFLINE: dict[str, TextTask] = {
    "sentiment": TextTask(
        "does a critic's sentence praise the film (Rotten Tomatoes)",
        PROMPT_A.template,
        PROMPT_A.verbalizers,
        sentiment,
    ),
    "viewers": TextTask(
        "does the end of a viewer's review praise the film (IMDB)", PROMPT_A.template, PROMPT_A.verbalizers, viewers
    ),
    "source": TextTask(
        "did a critic or a viewer write it", "{text} This was written by a", (" critic", " viewer"), source
    ),
    "questions": TextTask(
        "does a question ask for a person, a place, a number or a time; by rule",
        "{text} The answer is a",
        (" person", " place", " number", " time"),
        made_by(question, 4, "questions"),
    ),
    "acceptability": TextTask(
        "is a sentence well-formed; by rule",
        "{text} This sentence is",
        (" wrong", " right"),
        made_by(acceptability, 2, "acceptability"),
    ),
    "entailment": TextTask(
        "does a hypothesis follow from quantifiers and negation; by rule",
        "{text} Is it true that {pair} ? Answer :",
        (" yes", " no", " maybe"),
        made_by(entailment, 3, "entailment"),
    ),
    "numbers": TextTask(
        "which of two numbers is larger; by rule",
        "{text} The one who has more is the",
        (" first", " second"),
        made_by(more, 2, "numbers"),
    ),
}

#: Tasks of a model hub.
HUB: dict[str, TextTask] = {
    "sst2": TextTask(
        "sentiment of a sentence (GLUE)",
        PROMPT_A.template,
        PROMPT_A.verbalizers,
        from_hub("nyu-mll/glue", "sst2", lambda row: row["sentence"].strip(), lambda row: ""),
    ),
    "rte": TextTask(
        "entailment (GLUE)",
        '{text}\nDoes this mean that "{pair}" is true? Yes or No?\n',
        ("Yes", "No"),
        from_hub("nyu-mll/glue", "rte", lambda row: row["sentence1"], lambda row: row["sentence2"]),
    ),
    "boolq": TextTask(
        "a question about a passage (BoolQ)",
        "{text} {pair}?\n",
        ("No", "Yes"),
        from_hub("google/boolq", None, lambda row: row["passage"], lambda row: row["question"], "answer"),
    ),
    "cb": TextTask(
        "entailment in three classes (SuperGLUE)",
        'Suppose {text} Can we infer that "{pair}"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        from_hub("aps/super_glue", "cb", lambda row: row["premise"], lambda row: row["hypothesis"]),
    ),
    "wic": TextTask(
        "does a word mean the same in two sentences (SuperGLUE)",
        "{pair}\n{text}\nYes, or No?\n",
        ("No", "Yes"),
        from_hub(
            "aps/super_glue",
            "wic",
            lambda row: f"{row['sentence1']}\n{row['sentence2']}",
            lambda row: f'Does the word "{row["word"]}" have the same meaning in these two sentences?',
        ),
    ),
    "copa": TextTask(
        "which of two sentences is the cause or the result, as a classification (SuperGLUE)",
        "{text} {pair} Answer:",
        (" First", " Second"),
        from_hub("aps/super_glue", "copa", lambda row: row["premise"], copa_question),
    ),
}

TASKS: dict[str, TextTask] = OFFLINE | HUB

__all__ = ["HUB", "OFFLINE", "TASKS", "Parts", "Sizes", "TextTask"]
