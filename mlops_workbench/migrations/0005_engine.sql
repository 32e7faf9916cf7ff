-- What the engine must remember: the pipeline a run was asked for, and for each stage why it may be taken over by a later run.
ALTER TABLE exp.runs
    ADD COLUMN definition jsonb,
    ADD COLUMN engine text,
    ADD COLUMN parent text,
    ADD COLUMN options jsonb;

ALTER TABLE exp.run_stages
    ADD COLUMN key jsonb,
    ADD COLUMN key_digest text,
    ADD COLUMN files jsonb,
    ADD COLUMN wrote jsonb,
    ADD COLUMN modules jsonb,
    ADD COLUMN cached_from text,
    ADD COLUMN cell integer;

CREATE INDEX run_stages_by_key ON exp.run_stages (name, key_digest);
