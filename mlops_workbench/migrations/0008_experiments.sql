-- Experiments: what is compared and on whom, in which phases it ran, and which unit saw what. What ran is never rewritten.
CREATE TABLE exp.unit_types (
    unit_type text PRIMARY KEY CHECK (unit_type ~ '^[a-z][a-z0-9_]*$')
);

INSERT INTO exp.unit_types VALUES ('user'), ('household'), ('session'), ('device'), ('account'), ('profile');

CREATE TABLE exp.experiments (
    key text PRIMARY KEY CHECK (key ~ '^[a-z0-9][a-z0-9_.-]*$'),
    policy text NOT NULL,
    unit_type text NOT NULL REFERENCES exp.unit_types,
    definition jsonb NOT NULL,
    digest text NOT NULL,
    author text NOT NULL,
    status text NOT NULL DEFAULT 'draft' CHECK (status IN ('draft', 'active', 'paused', 'completed')),
    namespace text,
    namespace_low double precision,
    namespace_high double precision,
    ends_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (key, unit_type),
    CHECK ((namespace IS NULL) = (namespace_low IS NULL) AND (namespace IS NULL) = (namespace_high IS NULL)),
    CHECK (0 <= namespace_low AND namespace_low < namespace_high AND namespace_high <= 1),
    -- two running experiments of a namespace share no unit; a hash stands for the name, for which GiST has no operator
    CONSTRAINT namespaces_do_not_overlap EXCLUDE USING gist (
        int8range(hashtextextended(namespace, 0), hashtextextended(namespace, 0), '[]') WITH &&,
        numrange(namespace_low::numeric, namespace_high::numeric) WITH &&
    ) WHERE (namespace IS NOT NULL AND status IN ('active', 'paused'))
);

CREATE TABLE exp.variants (
    experiment text NOT NULL,
    unit_type text NOT NULL,
    variant text NOT NULL CHECK (variant <> ''),
    ordinal integer NOT NULL CHECK (ordinal >= 0),
    control boolean NOT NULL,
    low integer NOT NULL CHECK (low >= 0),
    high integer NOT NULL CHECK (high <= 10000),
    policy text NOT NULL,
    policy_version integer,
    parameters jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (experiment, variant),
    UNIQUE (experiment, ordinal),
    UNIQUE (experiment, unit_type, variant),
    CHECK (low < high),
    FOREIGN KEY (experiment, unit_type) REFERENCES exp.experiments (key, unit_type),
    FOREIGN KEY (policy, policy_version) REFERENCES exp.policy_versions (policy, version)
);

CREATE UNIQUE INDEX one_control ON exp.variants (experiment) WHERE control;

CREATE TABLE exp.experiment_phases (
    experiment text NOT NULL REFERENCES exp.experiments,
    phase integer NOT NULL CHECK (phase >= 1),
    coverage integer NOT NULL CHECK (coverage BETWEEN 0 AND 10000),
    arms jsonb NOT NULL,
    started_at timestamptz NOT NULL,
    ended_at timestamptz CHECK (ended_at >= started_at),
    PRIMARY KEY (experiment, phase)
);

CREATE UNIQUE INDEX one_open_phase ON exp.experiment_phases (experiment) WHERE ended_at IS NULL;

-- Every change of an experiment, so that what was in force at a time can be read without replaying anything.
CREATE TABLE exp.experiment_states (
    experiment text NOT NULL REFERENCES exp.experiments,
    seq integer NOT NULL CHECK (seq >= 1),
    action text NOT NULL,
    status text NOT NULL,
    phase integer,
    since timestamptz NOT NULL,
    PRIMARY KEY (experiment, seq),
    FOREIGN KEY (experiment, phase) REFERENCES exp.experiment_phases
);

-- One row per experiment, unit and phase; the keys refuse a variant or a unit type of another experiment.
CREATE TABLE exp.assignments (
    experiment text NOT NULL,
    phase integer NOT NULL,
    unit_type text NOT NULL,
    unit_id text NOT NULL CHECK (unit_id <> ''),
    variant text NOT NULL,
    bucket integer NOT NULL CHECK (bucket BETWEEN 0 AND 9999),
    assigned_at timestamptz NOT NULL,
    PRIMARY KEY (experiment, unit_type, unit_id, phase),
    FOREIGN KEY (experiment, unit_type, variant) REFERENCES exp.variants (experiment, unit_type, variant),
    FOREIGN KEY (experiment, phase) REFERENCES exp.experiment_phases
);

CREATE INDEX assignments_by_unit ON exp.assignments (unit_type, unit_id);

CREATE FUNCTION exp.guard_experiment() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.status <> 'draft' AND
       (NEW.key, NEW.policy, NEW.unit_type, NEW.definition, NEW.digest, NEW.namespace, NEW.namespace_low, NEW.namespace_high,
        NEW.ends_at)
       IS DISTINCT FROM
       (OLD.key, OLD.policy, OLD.unit_type, OLD.definition, OLD.digest, OLD.namespace, OLD.namespace_low, OLD.namespace_high,
        OLD.ends_at) THEN
        RAISE EXCEPTION 'experiment % has started: stop it and create another one instead of changing it', OLD.key;
    END IF;
    IF NEW.status <> OLD.status AND (OLD.status, NEW.status) NOT IN
       (('draft', 'active'), ('active', 'paused'), ('paused', 'active'), ('active', 'completed'), ('paused', 'completed')) THEN
        RAISE EXCEPTION 'experiment % is %: it cannot become %', OLD.key, OLD.status, NEW.status;
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER experiment_is_guarded BEFORE UPDATE ON exp.experiments
    FOR EACH ROW EXECUTE FUNCTION exp.guard_experiment();

CREATE FUNCTION exp.guard_variant() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    named text := CASE TG_OP WHEN 'INSERT' THEN NEW.experiment ELSE OLD.experiment END;
BEGIN
    IF EXISTS (SELECT 1 FROM exp.experiment_phases WHERE experiment = named) THEN
        RAISE EXCEPTION 'experiment % has started: its variants stay as they are', named;
    END IF;
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END
$$;

CREATE TRIGGER variant_is_guarded BEFORE INSERT OR UPDATE OR DELETE ON exp.variants
    FOR EACH ROW EXECUTE FUNCTION exp.guard_variant();

CREATE FUNCTION exp.guard_phase() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before exp.experiment_phases;
BEGIN
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'phase % of experiment % has started: it cannot be deleted', OLD.phase, OLD.experiment;
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF OLD.ended_at IS NOT NULL OR (NEW.experiment, NEW.phase, NEW.coverage, NEW.arms, NEW.started_at)
           IS DISTINCT FROM (OLD.experiment, OLD.phase, OLD.coverage, OLD.arms, OLD.started_at) THEN
            RAISE EXCEPTION 'phase % of experiment % has started: it can only be ended, once', OLD.phase, OLD.experiment;
        END IF;
        RETURN NEW;
    END IF;
    SELECT * INTO before FROM exp.experiment_phases WHERE experiment = NEW.experiment ORDER BY phase DESC LIMIT 1;
    IF before IS NULL THEN
        IF NOT (SELECT coalesce(bool_and(low = low_expected) AND max(high) = 10000 AND count(*) FILTER (WHERE control) = 1, false)
                FROM (SELECT *, coalesce(lag(high) OVER (ORDER BY ordinal), 0) AS low_expected
                      FROM exp.variants WHERE experiment = NEW.experiment) AS arm) THEN
            RAISE EXCEPTION 'experiment %: its variants must fill the 10,000 buckets, with one control', NEW.experiment;
        END IF;
    ELSIF NEW.phase <> before.phase + 1 OR NEW.coverage <= before.coverage OR NEW.arms <> before.arms
          OR NEW.started_at < before.ended_at THEN
        RAISE EXCEPTION 'phase % of experiment %: a phase follows the one before, with the same arms and more coverage',
            NEW.phase, NEW.experiment;
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER phase_is_guarded BEFORE INSERT OR UPDATE OR DELETE ON exp.experiment_phases
    FOR EACH ROW EXECUTE FUNCTION exp.guard_phase();

CREATE FUNCTION exp.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on exp.% is refused: what happened stays as it was written', TG_OP, TG_TABLE_NAME;
END
$$;

CREATE TRIGGER states_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON exp.experiment_states
    FOR EACH STATEMENT EXECUTE FUNCTION exp.refuse_change();

-- a unit's rows can be deleted, to forget the unit
CREATE TRIGGER assignments_do_not_change BEFORE UPDATE OR TRUNCATE ON exp.assignments
    FOR EACH STATEMENT EXECUTE FUNCTION exp.refuse_change();

CREATE TRIGGER phases_are_not_truncated BEFORE TRUNCATE ON exp.experiment_phases
    FOR EACH STATEMENT EXECUTE FUNCTION exp.refuse_change();
