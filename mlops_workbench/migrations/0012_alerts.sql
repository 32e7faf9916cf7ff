-- Alerts: what is wrong, since when, who knows of it and what to run. One row while it is open; it stays when it is over.
CREATE TABLE exp.alerts (
    alert_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    fingerprint text NOT NULL,
    origin text NOT NULL CHECK (origin <> ''),
    name text NOT NULL CHECK (name <> ''),
    severity text NOT NULL CHECK (severity IN ('info', 'warning', 'critical')),
    labels jsonb NOT NULL,
    words text NOT NULL,
    run text NOT NULL,
    started_at timestamptz NOT NULL,
    seen_at timestamptz NOT NULL,
    times bigint NOT NULL DEFAULT 1 CHECK (times >= 1),
    acknowledged_at timestamptz,
    acknowledged_by text,
    ended_at timestamptz,
    CHECK ((acknowledged_at IS NULL) = (acknowledged_by IS NULL))
);

CREATE UNIQUE INDEX one_open_alert ON exp.alerts (fingerprint) WHERE ended_at IS NULL;
CREATE INDEX alerts_by_start ON exp.alerts (started_at DESC);
-- what another system sends again is the same alert: it tells when the alert began
CREATE UNIQUE INDEX one_alert_a_start ON exp.alerts (fingerprint, started_at) WHERE origin = 'alertmanager';

-- Who was told what, and what came in the way. A claim keeps two controllers from telling the same.
CREATE TABLE exp.alert_deliveries (
    alert_id bigint NOT NULL REFERENCES exp.alerts ON DELETE CASCADE,
    channel text NOT NULL,
    occasion text NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    claimed_until timestamptz NOT NULL,
    delivered_at timestamptz,
    error text NOT NULL DEFAULT '',
    PRIMARY KEY (alert_id, channel, occasion)
);
