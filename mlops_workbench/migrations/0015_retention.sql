-- What is kept how long, what was taken out of use, and whose data were erased.
-- A dataset that held an erased unit is withdrawn: its files are gone, this row and everything that was decided on it stay.
ALTER TABLE exp.datasets
    ADD COLUMN withdrawn_at timestamptz,
    ADD COLUMN withdrawn_entry bigint;

-- Dataset and model versions that used an erased unit. The mark is the one in the ledger; nothing leads from it to the unit.
CREATE TABLE exp.taints (
    kind text NOT NULL CHECK (kind IN ('dataset', 'model')),
    name text NOT NULL,
    version text NOT NULL,
    mark text NOT NULL,
    tainted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    entry bigint NOT NULL,
    PRIMARY KEY (kind, name, version, mark)
);

-- Somebody asks for a policy to be trained again; whoever decides about training answers each request once.
CREATE TABLE exp.retrain_requests (
    request bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    policy text NOT NULL,
    reason text NOT NULL CHECK (reason <> ''),
    asked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    by text NOT NULL CHECK (by <> ''),
    answered_at timestamptz,
    answer jsonb
);

CREATE UNIQUE INDEX one_open_retrain_request ON exp.retrain_requests (policy, reason) WHERE answered_at IS NULL;

-- The journal of erasures: while one is open it knows whom it is about, so that whoever comes after a crash can finish it.
CREATE TABLE exp.erasures (
    erasure text PRIMARY KEY,
    mark text NOT NULL,
    actor text NOT NULL,
    asked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    done_at timestamptz,
    subject jsonb, -- unit_type, unit_id and what else leads to it; null when it is done
    found jsonb NOT NULL DEFAULT '{}', -- digest of a place → how many traces were taken out of it
    entry bigint,
    CHECK ((done_at IS NULL) = (subject IS NOT NULL)),
    CHECK ((done_at IS NULL) = (entry IS NULL))
);

-- Digests of erased units under a key of this database's own: an import or a simulation can see that it must not bring one back.
CREATE TABLE exp.erasure_key (
    "only" boolean PRIMARY KEY DEFAULT true CHECK ("only"),
    key bytea NOT NULL
);

CREATE TABLE exp.erased_units (
    digest text PRIMARY KEY,
    erased_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Events that left the log for a file, one row a file; a file that expired keeps its row.
CREATE TABLE exp.event_archives (
    type text NOT NULL,
    month date NOT NULL,
    part integer NOT NULL CHECK (part >= 1),
    n_rows bigint NOT NULL,
    digest text NOT NULL,
    place text NOT NULL,
    archived_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    removed_at timestamptz,
    PRIMARY KEY (type, month, part)
);

-- A version that was retired for good: it never comes back by a rollback that names no version, and its files may be freed.
ALTER TABLE exp.policy_versions DROP CONSTRAINT policy_versions_status_check;
ALTER TABLE exp.policy_versions ADD CONSTRAINT policy_versions_status_check
    CHECK (status IN ('candidate', 'experiment', 'production', 'retired', 'rolled_back', 'archived'));

-- The ids of events that were erased stay in this column; among the statistics of the planner of queries they have no business.
ALTER TABLE exp.event_ids ALTER COLUMN id SET STATISTICS 0;
