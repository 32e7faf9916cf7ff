-- The hash chain of decisions. The triggers stop mistakes; the chain itself shows whoever goes around them.
CREATE TABLE exp.ledger (
    seq bigint PRIMARY KEY,
    written_at timestamptz NOT NULL,
    held_from timestamptz NOT NULL,
    actor text NOT NULL,
    action text NOT NULL,
    subject jsonb NOT NULL,
    evidence jsonb NOT NULL,
    previous text NOT NULL,
    digest text NOT NULL UNIQUE
);

CREATE INDEX ledger_by_subject ON exp.ledger USING gin (subject jsonb_path_ops);

CREATE FUNCTION exp.refuse_ledger_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the ledger is append-only: write a correcting entry instead of % on it', TG_OP;
END
$$;

CREATE TRIGGER ledger_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON exp.ledger
    FOR EACH STATEMENT EXECUTE FUNCTION exp.refuse_ledger_change();
