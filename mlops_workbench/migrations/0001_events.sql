-- The append-only event log, one partition a month of event_at; partitions are made when a month is first written.
CREATE TABLE exp.events (
    id uuid NOT NULL,
    type text NOT NULL,
    unit_type text NOT NULL,
    unit_id text NOT NULL,
    experiments jsonb NOT NULL DEFAULT '{}',
    context jsonb NOT NULL DEFAULT '{}',
    metrics jsonb NOT NULL DEFAULT '{}',
    payload jsonb NOT NULL DEFAULT '{}',
    event_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    source text GENERATED ALWAYS AS (context ->> 'source') STORED,
    PRIMARY KEY (id, event_at)
) PARTITION BY RANGE (event_at);

CREATE INDEX events_by_type ON exp.events (type, source, event_at);
CREATE INDEX events_by_unit ON exp.events (unit_id, type, event_at DESC);

-- A unique index on a partitioned table must hold the partition key, so (id, event_at) cannot stop the same id
-- from being sent again with another time. This table can: an event is written only by who wrote its id here.
CREATE TABLE exp.event_ids (
    id uuid PRIMARY KEY
);
