-- Rollouts: what was planned, how far it has come, and every decision with the numbers that it rests on.
CREATE TABLE exp.rollouts (
    rollout text PRIMARY KEY CHECK (rollout ~ '^[a-z0-9][a-z0-9_.-]*$'),
    policy text NOT NULL,
    candidate integer NOT NULL,
    control integer,
    mode text NOT NULL CHECK (mode IN ('canary', 'blue-green', 'shadow')),
    plan jsonb NOT NULL,
    status text NOT NULL CHECK (status IN ('active', 'paused', 'finished', 'rolled_back', 'aborted')),
    step integer NOT NULL DEFAULT 0 CHECK (step >= 0),
    started_at timestamptz NOT NULL,
    step_at timestamptz NOT NULL,
    ended_at timestamptz,
    -- what was decided and is being carried out: whoever comes after a crash carries it out before deciding anything
    pending jsonb,
    actor text NOT NULL,
    reason text NOT NULL DEFAULT '',
    FOREIGN KEY (policy, candidate) REFERENCES exp.policy_versions (policy, version),
    FOREIGN KEY (policy, control) REFERENCES exp.policy_versions (policy, version),
    CHECK ((ended_at IS NOT NULL) = (status IN ('finished', 'rolled_back', 'aborted')))
);

CREATE UNIQUE INDEX one_rollout_a_policy ON exp.rollouts (policy) WHERE ended_at IS NULL AND mode <> 'shadow';
CREATE UNIQUE INDEX one_shadow_a_policy ON exp.rollouts (policy) WHERE ended_at IS NULL AND mode = 'shadow';

CREATE TABLE exp.rollout_decisions (
    rollout text NOT NULL REFERENCES exp.rollouts,
    seq integer NOT NULL CHECK (seq >= 1),
    decided_at timestamptz NOT NULL,
    action text NOT NULL,
    step integer NOT NULL,
    decision jsonb NOT NULL,
    entry bigint NOT NULL,
    PRIMARY KEY (rollout, seq)
);

CREATE FUNCTION exp.refuse_rollout_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on exp.% is refused: what was decided stays as it was written', TG_OP, TG_TABLE_NAME;
END
$$;

CREATE TRIGGER rollout_decisions_do_not_change BEFORE UPDATE OR DELETE OR TRUNCATE ON exp.rollout_decisions
    FOR EACH STATEMENT EXECUTE FUNCTION exp.refuse_rollout_change();

CREATE FUNCTION exp.guard_rollout() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.rollout, NEW.policy, NEW.candidate, NEW.control, NEW.mode, NEW.plan, NEW.started_at)
       IS DISTINCT FROM (OLD.rollout, OLD.policy, OLD.candidate, OLD.control, OLD.mode, OLD.plan, OLD.started_at) THEN
        RAISE EXCEPTION 'rollout % has started: abort it and start another one instead of changing its plan', OLD.rollout;
    END IF;
    IF OLD.ended_at IS NOT NULL THEN
        RAISE EXCEPTION 'rollout % is over: it is %', OLD.rollout, OLD.status;
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER rollout_is_guarded BEFORE UPDATE ON exp.rollouts
    FOR EACH ROW EXECUTE FUNCTION exp.guard_rollout();
