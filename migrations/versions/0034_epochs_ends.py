"""NAME@3 means the end of epoch 3, also where a stop in the middle of the next one is kept.

Revision 0034, after 0033.
"""

from __future__ import annotations

from importlib import import_module

from alembic import op

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None

# Of several stops with as many finished epochs the first is the one at the end of the last of these.
FIND_CHECKPOINT = """
CREATE OR REPLACE FUNCTION model.find_checkpoint(checkpoint text) RETURNS integer LANGUAGE plpgsql STABLE AS $$
DECLARE
    found_id integer;
    base text := regexp_replace($1, '@[^@]*$', '');
    part text := substring($1 FROM '@([^@]*)$');
    run bigint;
    kept text;
BEGIN
    SELECT c.checkpoint_id INTO found_id FROM model.checkpoint c
    WHERE c.name = $1 AND c.is_final ORDER BY c.checkpoint_id DESC LIMIT 1;
    IF found_id IS NOT NULL THEN RETURN found_id; END IF;
    SELECT a.checkpoint_id INTO found_id FROM model.alias a WHERE a.alias = ltrim($1, '@') AND a.valid_to IS NULL;
    IF found_id IS NOT NULL THEN RETURN found_id; END IF;
    IF base <> '' AND part IS NOT NULL AND EXISTS (SELECT FROM model.checkpoint c WHERE c.name = base) THEN
        SELECT c.job_id INTO run FROM model.checkpoint c WHERE c.name = base ORDER BY c.checkpoint_id DESC LIMIT 1;
        SELECT c.checkpoint_id INTO found_id FROM model.checkpoint c
        WHERE c.name = base AND c.job_id IS NOT DISTINCT FROM run
          AND CASE part WHEN 'best' THEN c.is_best WHEN 'last' THEN true ELSE c.epoch::text = part END
        ORDER BY c.is_final DESC, CASE WHEN part IN ('best', 'last') THEN -c.step ELSE c.step END, c.checkpoint_id DESC
        LIMIT 1;
        IF found_id IS NOT NULL THEN RETURN found_id; END IF;
        SELECT string_agg(k.epoch::text || CASE WHEN k.best THEN ' (best)' ELSE '' END, ', ' ORDER BY k.epoch) INTO kept
        FROM (SELECT c.epoch, bool_or(c.is_best) AS best FROM model.checkpoint c
              WHERE c.name = base AND c.job_id IS NOT DISTINCT FROM run GROUP BY 1) k;
        RAISE EXCEPTION 'Expected a kept epoch of checkpoint ''%'' (%), best or last after the @, found ''%''.',
            base, kept, part USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT c.checkpoint_id INTO found_id FROM model.checkpoint c WHERE c.checkpoint_id::text = $1;
    IF found_id IS NOT NULL THEN RETURN found_id; END IF;
    IF $1 ~ '^[0-9a-f]{6,64}$' THEN
        SELECT string_agg(DISTINCT left(c.sha256, 12), ', ') INTO kept FROM model.checkpoint c
        WHERE starts_with(c.sha256, $1);
        IF position(',' IN kept) > 0 THEN
            RAISE EXCEPTION 'Expected the beginning of one digest, found ''%'', which begins several: %.', $1, kept
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        SELECT c.checkpoint_id INTO found_id FROM model.checkpoint c
        WHERE starts_with(c.sha256, $1) ORDER BY c.checkpoint_id DESC LIMIT 1;
        IF found_id IS NOT NULL THEN RETURN found_id; END IF;
    END IF;
    RAISE EXCEPTION 'No checkpoint named ''%''; `lachesis ls checkpoints` lists them.', $1
        USING ERRCODE = 'no_data_found';
END $$
"""


def upgrade() -> None:
    op.execute(FIND_CHECKPOINT)


def downgrade() -> None:
    op.execute(import_module("migrations.versions.0026_checkpoint_names").FIND_CHECKPOINT)
