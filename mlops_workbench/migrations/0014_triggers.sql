-- Triggers: what was decided about running a pipeline again, every yes and every no, and what became of each yes.
CREATE TABLE exp.triggers (
    trigger text PRIMARY KEY CHECK (trigger <> ''),
    seen_at timestamptz NOT NULL, -- first; causes before it start nothing
    clock_at timestamptz NOT NULL, -- newest time at which it was looked at: an earlier one means that the clock went back
    code jsonb -- file → digest, of the last start; null until code is a condition
);

CREATE TABLE exp.trigger_decisions (
    trigger text NOT NULL REFERENCES exp.triggers,
    seq integer NOT NULL CHECK (seq >= 1),
    outcome text NOT NULL CHECK (outcome IN ('start', 'wait', 'held', 'blocked', 'clock')),
    key text NOT NULL, -- of a start: its causes; of a no: which kind, so that the same no is one row
    reason text NOT NULL,
    causes jsonb NOT NULL DEFAULT '[]',
    facts jsonb NOT NULL DEFAULT '{}',
    decided_at timestamptz NOT NULL,
    counts_at timestamptz NOT NULL, -- decided_at, or when the clock was found to have gone back before it
    last_at timestamptz NOT NULL, -- a no that is repeated is one row
    times bigint NOT NULL DEFAULT 1 CHECK (times >= 1),
    actor text NOT NULL,
    -- of a start
    pipeline text,
    profile text,
    parameters jsonb,
    policy text,
    status text CHECK (status IN ('pending', 'running', 'finished', 'refused', 'failed')),
    attempts integer NOT NULL DEFAULT 0,
    run_id text,
    ended_at timestamptz,
    error text,
    entry bigint,
    PRIMARY KEY (trigger, seq),
    CHECK ((outcome = 'start') = (status IS NOT NULL)),
    CHECK ((status IN ('finished', 'refused', 'failed')) = (ended_at IS NOT NULL))
);

-- exactly once: one start a cause, and one run at a time
CREATE UNIQUE INDEX one_start_a_cause ON exp.trigger_decisions (trigger, key) WHERE outcome = 'start';
CREATE UNIQUE INDEX one_open_start ON exp.trigger_decisions (trigger) WHERE status IN ('pending', 'running');

-- What people ask for; each is answered by one start.
CREATE TABLE exp.trigger_requests (
    request bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    trigger text NOT NULL,
    reason text NOT NULL CHECK (reason <> ''),
    by text NOT NULL CHECK (by <> ''),
    forced boolean NOT NULL DEFAULT false, -- even on broken data
    asked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    answered_at timestamptz,
    seq integer,
    FOREIGN KEY (trigger, seq) REFERENCES exp.trigger_decisions
);

CREATE INDEX open_trigger_requests ON exp.trigger_requests (trigger) WHERE answered_at IS NULL;

-- When each chore of the controller was done, so that several controllers do it once.
CREATE TABLE exp.chores (
    chore text PRIMARY KEY,
    begun_at timestamptz NOT NULL,
    ended_at timestamptz,
    said text NOT NULL DEFAULT '',
    error text, -- of the last turn; null when it went well
    turns bigint NOT NULL DEFAULT 0,
    failures bigint NOT NULL DEFAULT 0
);

-- rows that arrived since a time are found without reading what came before; a block range costs writers next to nothing
CREATE INDEX events_by_arrival ON exp.events USING brin (received_at);

CREATE FUNCTION exp.guard_trigger_decision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'UPDATE' THEN
        RAISE EXCEPTION '% on exp.% is refused: what was decided stays as it was written', TG_OP, TG_TABLE_NAME;
    END IF;
    IF (NEW.trigger, NEW.seq, NEW.outcome, NEW.key, NEW.causes, NEW.decided_at, NEW.pipeline, NEW.profile, NEW.parameters, NEW.entry)
       IS DISTINCT FROM
       (OLD.trigger, OLD.seq, OLD.outcome, OLD.key, OLD.causes, OLD.decided_at, OLD.pipeline, OLD.profile, OLD.parameters, OLD.entry)
       OR (OLD.outcome = 'start' AND NEW.reason <> OLD.reason) THEN
        RAISE EXCEPTION 'decision % of trigger % is made: what was decided stays as it was written', OLD.seq, OLD.trigger;
    END IF;
    IF OLD.ended_at IS NOT NULL AND NEW.status <> OLD.status THEN
        RAISE EXCEPTION 'decision % of trigger % is over: it is %', OLD.seq, OLD.trigger, OLD.status;
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER trigger_decision_is_guarded BEFORE UPDATE OR DELETE ON exp.trigger_decisions
    FOR EACH ROW EXECUTE FUNCTION exp.guard_trigger_decision();
CREATE TRIGGER trigger_decisions_are_not_truncated BEFORE TRUNCATE ON exp.trigger_decisions
    FOR EACH STATEMENT EXECUTE FUNCTION exp.guard_trigger_decision();
