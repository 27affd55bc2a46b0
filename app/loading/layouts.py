"""The order of columns in CDM 5.2, 5.3 and 5.4, for files whose header does not say it.

Orders are those of the versions' DDL (https://github.com/OHDSI/CommonDataModel). Some tables were ordered otherwise
within a version: 5.3.0 and 5.3.1 keep the status of a condition last, and 5.3.0 has its own order for visit details.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.loading.cdm import VOCABULARY_TABLES

VERSIONS = ("5.2", "5.3", "5.4")

_PERSON = (
    "person_id gender_concept_id year_of_birth month_of_birth day_of_birth birth_datetime race_concept_id "
    "ethnicity_concept_id location_id provider_id care_site_id person_source_value gender_source_value "
    "gender_source_concept_id race_source_value race_source_concept_id ethnicity_source_value "
    "ethnicity_source_concept_id"
)
_PERIOD = (
    "observation_period_id person_id observation_period_start_date observation_period_end_date period_type_concept_id"
)
_VISIT = (
    "visit_occurrence_id person_id visit_concept_id visit_start_date visit_start_datetime visit_end_date "
    "visit_end_datetime visit_type_concept_id provider_id care_site_id visit_source_value visit_source_concept_id "
)
_VISIT_BEFORE = (
    f"{_VISIT} admitting_source_concept_id admitting_source_value discharge_to_concept_id discharge_to_source_value "
    "preceding_visit_occurrence_id"
)
_VISIT_NOW = (
    f"{_VISIT} admitted_from_concept_id admitted_from_source_value discharged_to_concept_id "
    "discharged_to_source_value preceding_visit_occurrence_id"
)
_DETAIL = (
    "visit_detail_id person_id visit_detail_concept_id visit_detail_start_date visit_detail_start_datetime "
    "visit_detail_end_date visit_detail_end_datetime visit_detail_type_concept_id provider_id care_site_id "
)
_DETAIL_530 = (
    f"{_DETAIL} admitting_source_concept_id discharge_to_concept_id preceding_visit_detail_id "
    "visit_detail_source_value visit_detail_source_concept_id admitting_source_value discharge_to_source_value "
    "visit_detail_parent_id visit_occurrence_id"
)
_DETAIL_53 = (
    f"{_DETAIL} visit_detail_source_value visit_detail_source_concept_id admitting_source_value "
    "admitting_source_concept_id discharge_to_source_value discharge_to_concept_id preceding_visit_detail_id "
    "visit_detail_parent_id visit_occurrence_id"
)
_DETAIL_54 = (
    f"{_DETAIL} visit_detail_source_value visit_detail_source_concept_id admitted_from_concept_id "
    "admitted_from_source_value discharged_to_source_value discharged_to_concept_id preceding_visit_detail_id "
    "parent_visit_detail_id visit_occurrence_id"
)
_CONDITION = (
    "condition_occurrence_id person_id condition_concept_id condition_start_date condition_start_datetime "
    "condition_end_date condition_end_datetime condition_type_concept_id "
)
_CONDITION_52 = (
    f"{_CONDITION} stop_reason provider_id visit_occurrence_id condition_source_value condition_source_concept_id "
    "condition_status_source_value condition_status_concept_id"
)
_CONDITION_531 = _CONDITION_52.replace("visit_occurrence_id", "visit_occurrence_id visit_detail_id")
_CONDITION_NOW = (
    f"{_CONDITION} condition_status_concept_id stop_reason provider_id visit_occurrence_id visit_detail_id "
    "condition_source_value condition_source_concept_id condition_status_source_value"
)
_DRUG = (
    "drug_exposure_id person_id drug_concept_id drug_exposure_start_date drug_exposure_start_datetime "
    "drug_exposure_end_date drug_exposure_end_datetime verbatim_end_date drug_type_concept_id stop_reason refills "
    "quantity days_supply sig route_concept_id lot_number provider_id visit_occurrence_id visit_detail_id "
    "drug_source_value drug_source_concept_id route_source_value dose_unit_source_value"
)
_PROCEDURE = (
    "procedure_occurrence_id person_id procedure_concept_id procedure_date procedure_datetime "
    "procedure_type_concept_id modifier_concept_id quantity provider_id visit_occurrence_id visit_detail_id "
    "procedure_source_value procedure_source_concept_id modifier_source_value"
)
_DEVICE = (
    "device_exposure_id person_id device_concept_id device_exposure_start_date device_exposure_start_datetime "
    "device_exposure_end_date device_exposure_end_datetime device_type_concept_id unique_device_id quantity "
    "provider_id visit_occurrence_id visit_detail_id device_source_value device_source_concept_id"
)
_MEASUREMENT = (
    "measurement_id person_id measurement_concept_id measurement_date measurement_datetime measurement_time "
    "measurement_type_concept_id operator_concept_id value_as_number value_as_concept_id unit_concept_id range_low "
    "range_high provider_id visit_occurrence_id visit_detail_id measurement_source_value "
    "measurement_source_concept_id unit_source_value value_source_value"
)
_OBSERVATION = (
    "observation_id person_id observation_concept_id observation_date observation_datetime "
    "observation_type_concept_id value_as_number value_as_string value_as_concept_id qualifier_concept_id "
    "unit_concept_id provider_id visit_occurrence_id visit_detail_id observation_source_value "
    "observation_source_concept_id unit_source_value qualifier_source_value"
)
_SPECIMEN = (
    "specimen_id person_id specimen_concept_id specimen_type_concept_id specimen_date specimen_datetime quantity "
    "unit_concept_id anatomic_site_concept_id disease_status_concept_id specimen_source_id specimen_source_value "
    "unit_source_value anatomic_site_source_value disease_status_source_value"
)
_DEATH = (
    "person_id death_date death_datetime death_type_concept_id cause_concept_id cause_source_value "
    "cause_source_concept_id"
)
_SOURCE = (
    "cdm_source_name cdm_source_abbreviation cdm_holder source_description source_documentation_reference "
    "cdm_etl_reference source_release_date cdm_release_date cdm_version vocabulary_version"
)


def _without_detail(columns: str) -> str:
    return columns.replace(" visit_detail_id", "")


_ALIKE = {"person": _PERSON, "observation_period": _PERIOD, "specimen": _SPECIMEN, "death": _DEATH}
_ALIKE |= {table.name: " ".join(name for name, _ in table.columns) for table in VOCABULARY_TABLES}
_V52: dict[str, tuple[str, ...]] = {
    "visit_occurrence": (_VISIT_BEFORE,),
    "condition_occurrence": (_CONDITION_52,),
    "drug_exposure": (_without_detail(_DRUG),),
    "procedure_occurrence": (_without_detail(_PROCEDURE),),
    "device_exposure": (_without_detail(_DEVICE),),
    "measurement": (_without_detail(_MEASUREMENT).replace(" measurement_time", ""),),
    "observation": (_without_detail(_OBSERVATION),),
    "cdm_source": (_SOURCE,),
}
_V53: dict[str, tuple[str, ...]] = {
    "visit_occurrence": (_VISIT_BEFORE,),
    "visit_detail": (_DETAIL_53, _DETAIL_530),
    "condition_occurrence": (_CONDITION_NOW, _CONDITION_531),
    "drug_exposure": (_DRUG,),
    "procedure_occurrence": (_PROCEDURE,),
    "device_exposure": (_DEVICE,),
    "measurement": (_MEASUREMENT, _MEASUREMENT.replace(" measurement_time", "")),
    "observation": (_OBSERVATION,),
    "cdm_source": (_SOURCE,),
}
_V54: dict[str, tuple[str, ...]] = {
    "visit_occurrence": (_VISIT_NOW,),
    "visit_detail": (_DETAIL_54,),
    "condition_occurrence": (_CONDITION_NOW,),
    "drug_exposure": (_DRUG,),
    "procedure_occurrence": (
        _PROCEDURE.replace("procedure_type", "procedure_end_date procedure_end_datetime procedure_type"),
    ),
    "device_exposure": (
        _DEVICE.replace("unique_device_id", "unique_device_id production_id")
        + " unit_concept_id unit_source_value unit_source_concept_id",
    ),
    "measurement": (
        _MEASUREMENT.replace("unit_source_value", "unit_source_value unit_source_concept_id")
        + " measurement_event_id meas_event_field_concept_id",
    ),
    "observation": (_OBSERVATION + " value_source_value observation_event_id obs_event_field_concept_id",),
    "cdm_source": (_SOURCE.replace("vocabulary_version", "cdm_version_concept_id vocabulary_version"),),
}
_BY_VERSION = {"5.2": _V52, "5.3": _V53, "5.4": _V54}


def layouts(table: str, version: str) -> list[tuple[str, ...]]:
    """The orders of a table's columns under a version, the usual one first; none where the version lacks the table."""
    listed: Sequence[str] = (_ALIKE[table],) if table in _ALIKE else _BY_VERSION[version].get(table, ())
    return [tuple(columns.split()) for columns in listed]


def versions_of_width(table: str, width: int) -> list[str]:
    """Versions under which a table has so many columns."""
    return [v for v in VERSIONS if any(len(layout) == width for layout in layouts(table, v))]
