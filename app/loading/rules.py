"""Every rule by which a loader rejects a row, and every flag it raises: what came, and how to mend it.

The one place where they are explained: `show load`, `show rejects` and the closing table read it, and a test holds that
no loader uses a rule that is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

UNEXPLAINED = "see docs/loading.md"
"""What is said of a rule that an older or newer Lachesis wrote."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A rule in words."""

    came: str
    """What was found."""
    mend: str
    """What to do about it, one sentence."""


REJECTS: Mapping[str, Explained] = {
    "unparsable_id": Explained(
        "an id or concept that is no whole number in range, or a missing key",
        "Export ids as whole numbers of 64 bits (7, not 7.0 or 007), and leave none empty.",
    ),
    "unparsable_time": Explained(
        "a date or time in another notation, or one that no calendar has",
        "Export dates as 2020-01-31 and times as 2020-01-31 08:15:00.",
    ),
    "missing_time": Explained("neither date nor datetime", "Complete the row's date in the source."),
    "time_out_of_range": Explained("a time before 1800 or after 2300", "Correct the year, or leave the row out."),
    "unknown_person": Explained(
        "a person that PERSON does not hold", "Deliver the person too, or leave that person's rows out."
    ),
    "duplicate_key": Explained(
        "one key with different contents", "Make keys unique: nobody can tell which of the rows is meant."
    ),
    "duplicate_row": Explained("a copy of a row that is loaded", "Nothing is lost; leave copies out if you like."),
    "key_shown_needs_upsert": Explained(
        "a key that is shown already, with other content",
        "Load the delivery with --mode upsert, if it is a correction.",
    ),
    "unparsable_flag": Explained(
        "neither yes nor no in the column deleted", "Write 1 or 0, true or false, yes or no, or leave it empty."
    ),
    "wrong_number_of_fields": Explained(
        "more or fewer fields than the header has", "Quote fields that hold delimiters or line ends."
    ),
    "malformed_quotes": Explained(
        "a quote that never closes, or text behind a closing one", "Double the quotes inside quoted fields."
    ),
    "nul_byte": Explained("a NUL character", "Clean the text of NUL characters."),
    "nul_character": Explained("a NUL character", "Clean the manifest of NUL characters."),
    "record_too_long": Explained(
        "a record of over a million characters", "Look for a quote that never closes, or shorten the text."
    ),
    "name_too_long": Explained(
        "a synonym of over 2,600 bytes", "Nothing is lost but this other name; shorten it if you search by it."
    ),
    "missing_name": Explained("a source without a name", "Name the source in CDM_SOURCE."),
    "missing_code": Explained("no code, or an empty one", "Give every row a code, or leave the row out."),
    "code_too_long": Explained(
        "a code of over a thousand characters", "Keep text in text_value; a code is a name that many rows share."
    ),
    "second_birth": Explained(
        "another MEDS_BIRTH of a person; the earliest is loaded", "Give every subject one birth at the most."
    ),
    "second_death": Explained(
        "another MEDS_DEATH of a person; the earliest is loaded", "Give every subject one death at the most."
    ),
    "path_outside_root": Explained(
        "a path that leaves its root", "Give paths below the folder that --root names, or another --root."
    ),
    "missing_path": Explained("no path", "Name the file or the series folder of the scan."),
    "missing_file": Explained(
        "no file at the path", "Copy the file to its place, or correct the path; then load the manifest again."
    ),
    "missing_mask": Explained(
        "no file where the column mask says", "Copy the mask to its place, correct its path, or leave it empty."
    ),
    "mask_outside_root": Explained(
        "a mask that leaves the root of its scan", "Give a --root that holds both scans and masks."
    ),
    "mask_not_nifti": Explained(
        "a mask whose name is not that of a NIfTI file", "Write masks as .nii.gz or .nii; 0 is outside."
    ),
    "unreadable_file": Explained(
        "a file whose header cannot be read", "Copy the file again; where it stays so, export the series anew."
    ),
    "no_person_in_name": Explained(
        "a file name without a person_id", "Name files <person_id>_<date>, or write a manifest."
    ),
    "no_person_in_header": Explained(
        "a header without a person_id", "Write a manifest that says whose scan each path is."
    ),
    "no_acquisition_time": Explained(
        "no time in manifest, header or name", "Give acquired_at in the manifest; without it no index can be set."
    ),
    "duplicate_record": Explained(
        "a scan that an earlier record names", "Nothing is lost; leave the record out if you like."
    ),
    "ambiguous_person": Explained(
        "a source value that several persons have", "Write a matching file that says which of them is meant."
    ),
    "not_in_match_file": Explained(
        "a scan that no line of the matching file names", "Add a line with its series_uid, study_uid or path."
    ),
    "missing_scan": Explained("a vector without a scan's name", "Say of every vector which scan it is of."),
    "unknown_scan": Explained(
        "a vector of a scan that the store does not hold", "Load the scan first, or leave its vector out."
    ),
    "ambiguous_scan": Explained(
        "a name that several scans have", "Name scans by image_occurrence_id: nobody can tell which is meant."
    ),
    "unparsable_number": Explained("a cell of a vector that is no number", "Write every vector in full, as numbers."),
    "wrong_width": Explained(
        "a vector of another length than the first one's", "Make all vectors of a file by one encoder."
    ),
    "not_finite": Explained(
        "a vector with NaN, infinity or a number beyond float32", "Look for the scan whose embedding fails."
    ),
    "zero_vector": Explained("a vector of zeros", "Leave scans out that could not be embedded."),
    "not_ct": Explained("a series of another modality than CT", "Nothing: only CT is loaded."),
    "not_an_image": Explained("an object without pixels, as a plan or a presentation", "Nothing: it is no scan."),
    "empty_file": Explained("a file without a byte", "Copy the file again."),
    "not_dicom": Explained("a file that does not begin as DICOM", "Nothing: it is no scan."),
    "forgotten": Explained(
        "a person whom `lachesis forget` took out", "Nothing: whoever withdrew is not loaded again."
    ),
    "dose_report": Explained("a radiation dose report", "Nothing: it is no scan."),
    "structured_report": Explained("a structured report", "Nothing: it is no scan."),
    "damaged_file": Explained(
        "a file that begins as DICOM and cannot be read", "Copy the file again; the job's set_aside.csv has its path."
    ),
    "header_crashed": Explained(
        "a file that ends the process reading it", "Leave it out, or export it anew; set_aside.csv has its path."
    ),
    "header_timeout": Explained(
        "a file that takes over half a minute to read", "Look at the disk, or export the file anew."
    ),
    "header_too_large": Explained(
        "a header that claims more memory than a header may", "Export it anew; it is damaged, or made to do harm."
    ),
    "unreadable_folder": Explained(
        "a folder that may not be listed", "Give the user who runs the worker the right to read it."
    ),
    "unnameable_file": Explained("a name that is no UTF-8 text", "Rename the file or folder."),
    "unknown_split": Explained("a split of another name", "Name splits train, valid or test."),
    "conflicting_split": Explained(
        "a person in several splits", "Put each person into one split; until then the person is split by hash."
    ),
    "unknown_study": Explained(
        "a study that the mapping does not hold", "Deliver the mapping of the same release as the labels."
    ),
}
"""Rule → why a row is not loaded."""

FLAGS: Mapping[str, Explained] = {
    "concept_zero": Explained(
        "no matching concept", "Map the source's codes to standard concepts; tasks by concept do not see these rows."
    ),
    "concept_absent": Explained(
        "a concept that the store's vocabulary lacks",
        "Load the vocabulary that the extract was mapped with; tasks by ancestor miss these rows.",
    ),
    "source_concept_absent": Explained(
        "a source concept that the store's vocabulary lacks",
        "Load the source vocabularies too, where tasks use source codes.",
    ),
    "not_in_use": Explained(
        "rows of a vocabulary that nothing in the store needs: they are kept beside it",
        "Nothing is missing; --full brings all of them into the store.",
    ),
    "unknown_visit": Explained(
        "a visit that VISIT_OCCURRENCE does not hold; the reference is null",
        "Deliver the visit, where visit labels or readmission are wanted.",
    ),
    "number_unusable": Explained(
        "a value that is no finite number (>10, 7,5); it is null",
        "Export numbers with a point, and signs in operator_concept_id.",
    ),
    "end_before_start": Explained("an end before its start; both are kept", "Correct the end in the source."),
    "end_out_of_range": Explained("an end before 1800 or after 2300; it is null", "Correct the year of the end."),
    "before_birth": Explained("an event before birth", "Correct birth or event; such rows count as history."),
    "after_death": Explained("an event after death", "Correct death or event; nothing after death is an outcome."),
    "in_the_future": Explained(
        "an event after today", "Fine where dates are shifted; else correct the year, since it stretches follow-up."
    ),
    "outside_observation_period": Explained(
        "an event in none of the person's periods",
        "Check how periods were made: follow-up ends with the period that holds the index.",
    ),
    "unparsable_label": Explained(
        "a label that is neither TRUE, FALSE, CENSORED nor a time", "Give the label file as it was released."
    ),
    "static_fact": Explained(
        "a row without a time; it is kept in omop.static_fact, and is no event",
        "Nothing, if it is meant; give the row a time where it happened at one.",
    ),
    "text_left_out": Explained("a text_value, which is not kept", "Nothing; code what labels or features need."),
    "concept_local": Explained(
        "a code that the vocabulary lacks; it became a concept of this store's own",
        "Nothing; load the vocabulary that has it, and the data set again, where descendants matter.",
    ),
    "visit_again": Explained(
        "another row of a visit; the first is in visit_occurrence", "Give each visit one row, with its end."
    ),
    "person_in_several_files": Explained(
        "a person whose rows lie in several shards (persons are counted)", "Keep a subject in one shard: MEDS asks it."
    ),
    "rows_unsorted": Explained(
        "a row before an earlier one of its person", "Sort each subject's rows by time: MEDS asks it."
    ),
    "parent_circle": Explained(
        "a parent code that closes a circle; it is left out (parents are counted)", "Correct parent_codes."
    ),
    "not_ct": Explained("another modality than CT", "Leave the series out of the manifest."),
    "localizer": Explained("a scout view", "Leave the series out of the manifest."),
    "multi_frame": Explained("an enhanced multi-frame object", "Export the series as single slices or NIfTI."),
    "colour": Explained("colour voxels", "Name the original series, not a screenshot of it."),
    "not_three_dimensional": Explained("a volume of another rank than three", "Export one volume a file."),
    "too_few_slices": Explained("fewer than five slices", "Copy the whole series, or leave it out."),
    "one_position": Explained("slices that all lie in one place", "Export the series anew with its positions."),
    "no_position": Explained("slices without a position", "Export the series anew with its positions."),
    "no_spacing": Explained("no believable spacing", "Export the series anew, with spacing in millimetres."),
    "most_slices_missing": Explained("gaps where most slices should be", "Copy the whole series."),
    "not_hounsfield": Explained("voxels that are no Hounsfield units", "Export raw values with slope and intercept."),
    "truncated": Explained("a file that ends before its voxels do", "Copy the file again."),
    "no_decoder": Explained("a compression that cannot be read", "Export the series uncompressed or as JPEG 2000."),
    "damaged_slices": Explained("slices that cannot be read", "Copy the series again."),
    "several_series": Explained(
        "several series in one folder; the largest is taken", "Keep one series a folder, or name files in a manifest."
    ),
    "mixed_geometry": Explained("slices of several sizes or directions", "Keep one series a folder."),
    "mixed_persons": Explained("slices of several persons", "Check the export, for it is unknown whose scan this is."),
    "duplicate_slices": Explained("a slice twice", "Nothing is lost; copies are left out."),
    "duplicate_positions": Explained("several slices in one place", "Check for two phases in one series."),
    "uneven_spacing": Explained("slices at uneven distances", "Check for missing slices; the volume is resampled."),
    "tilted_gantry": Explained("a tilted gantry", "Nothing, if the tilt is meant; the volume is sheared."),
    "oblique": Explained("axes oblique to the body", "Nothing, if the direction is meant; the volume is resampled."),
    "no_rescale": Explained("no rescale slope and intercept", "Check that the stored values are Hounsfield units."),
    "monochrome1": Explained("inverted grey values", "Check the export; white and black are swapped."),
    "no_orientation": Explained("no orientation", "Export with qform or sform, else left and right are a guess."),
    "orientations_disagree": Explained("qform and sform that disagree", "Export with one of them; sform is used."),
    "not_millimetres": Explained("lengths in another unit", "Check the spacing; it is converted where plausible."),
    "secondary_capture": Explained("a picture of a screen, or a page of doses", "Leave the series out."),
    "projection": Explained("a projection (MIP, volume rendering)", "Load the series that it was made of."),
    "derived": Explained(
        "a series made of another (ImageType DERIVED)", "Nothing, if a reformatted series is meant; else load both."
    ),
    "identity_conflict": Explained(
        "a header whose sex, birth year or another id contradicts its person",
        "Check how scans are matched to persons: this may be someone else's scan.",
    ),
    "series_uid_reused": Explained(
        "one series UID for several series", "Check the software that renamed the export; both are loaded."
    ),
    "unreadable_voxels": Explained(
        "voxels that could not be read, though the header could",
        "The log of the job that read them says why of each (lachesis logs JOB); mend the series, then load it again.",
    ),
    "no_ct_or_visit_that_day": Explained(
        "scans on whose day their person has neither a CT procedure nor a visit",
        "Where most are, records and scans were moved by different offsets: ask for one date shift for both.",
    ),
    "gone_from_source": Explained(
        "a scan that its source no longer has", "Nothing; it stays for what was derived from it, and joins no cohort."
    ),
}
"""Flag, or a scan's reason → what is remarkable in a row that is loaded."""


def mend(rule: str) -> str:
    """What to do about a rule or flag."""
    found = REJECTS.get(rule) or FLAGS.get(rule)
    return found.mend if found else UNEXPLAINED


def came(rule: str) -> str:
    """What was found where a rule or flag stands."""
    found = REJECTS.get(rule) or FLAGS.get(rule)
    return found.came if found else UNEXPLAINED
