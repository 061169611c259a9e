"""A user's models.conf in and out.

`models_conf` reads and writes the file without losing a byte, `find_model` maps a section to a model,
`survey` says what each profile costs and what `place` would do, `apply` writes a choice into a section.
"""

from placement.profiles.apply import Applied, apply_choice
from placement.profiles.choice import Choice, Measured, choice_of
from placement.profiles.chosen import best_arguments, chosen_row
from placement.profiles.find_model import ModelFinder, read_mapping, remember
from placement.profiles.measured import measured_of
from placement.profiles.models_conf import ModelsConf, Section, parse_models_conf, read_models_conf, words
from placement.profiles.sections import request_of, section_of
from placement.profiles.survey import Defaults, Profile, profile_row, read_profile, survey
from placement.profiles.table import survey_lines
from placement.profiles.whole import Placed, place_in_conf

__all__ = [
    "Applied",
    "Choice",
    "Defaults",
    "Measured",
    "ModelFinder",
    "ModelsConf",
    "Placed",
    "Profile",
    "Section",
    "apply_choice",
    "best_arguments",
    "choice_of",
    "chosen_row",
    "measured_of",
    "parse_models_conf",
    "place_in_conf",
    "profile_row",
    "read_mapping",
    "read_models_conf",
    "read_profile",
    "remember",
    "request_of",
    "section_of",
    "survey",
    "survey_lines",
    "words",
]
