-- Sums that analysis reads: per hour and day, and per unit. Marks say what a change has made stale; whoever recomputes takes them.
CREATE TABLE exp.metric_aggregates (
    experiment text NOT NULL REFERENCES exp.experiments,
    phase integer NOT NULL,
    variant text NOT NULL,
    metric text NOT NULL,
    bucket text NOT NULL CHECK (bucket IN ('hour', 'day')),
    starts_at timestamptz NOT NULL,
    count bigint NOT NULL,
    sum numeric NOT NULL,
    sum_squares numeric NOT NULL,
    denominator numeric NOT NULL,
    sketch jsonb NOT NULL,
    PRIMARY KEY (experiment, metric, bucket, starts_at, phase, variant)
);

-- Events that a metric could not use, per hour.
CREATE TABLE exp.metric_oddities (
    experiment text NOT NULL REFERENCES exp.experiments,
    metric text NOT NULL,
    starts_at timestamptz NOT NULL,
    unexposed bigint NOT NULL,
    mismatched bigint NOT NULL,
    unusable bigint NOT NULL,
    PRIMARY KEY (experiment, metric, starts_at)
);

CREATE TABLE exp.unit_totals (
    experiment text NOT NULL,
    metric text NOT NULL,
    unit_id text NOT NULL,
    phase integer NOT NULL,
    variant text NOT NULL,
    n bigint NOT NULL,
    y double precision NOT NULL,
    denominator double precision NOT NULL,
    x double precision NOT NULL,
    PRIMARY KEY (experiment, metric, unit_id, phase)
);

-- No key and no index on purpose: writers only append, so that they never wait for each other.
CREATE TABLE exp.event_marks (
    hour timestamptz NOT NULL,
    unit_type text NOT NULL,
    type text NOT NULL,
    first_received_at timestamptz NOT NULL,
    last_received_at timestamptz NOT NULL
);

CREATE TABLE exp.unit_marks (
    experiment text NOT NULL,
    unit_id text NOT NULL
);

CREATE TABLE exp.phase_marks (
    experiment text NOT NULL,
    since timestamptz NOT NULL
);

-- an hour of one type is read again and again; the same columns in another order
DROP INDEX exp.events_by_type;
CREATE INDEX events_by_type ON exp.events (type, event_at, source);

-- What a metric is read from: one row per type of events. `counts` marks a type of which each event adds 1 to the denominator.
CREATE VIEW exp.metric_sources AS
SELECT e.key AS experiment, e.unit_type, m.plan ->> 'metric' AS metric, s.type, s.type = m.plan ->> 'event' AS own,
       m.plan ->> 'value' AS value, m.plan ->> 'denominator' AS denominator, s.type = m.plan ->> 'denominator' AS counts,
       (m.plan ->> 'covariate')::boolean AS covariate, p.first_at, p.last_at
FROM exp.experiments AS e
CROSS JOIN LATERAL jsonb_array_elements(e.definition -> 'metrics') AS m (plan)
CROSS JOIN LATERAL (SELECT m.plan ->> 'event' UNION SELECT m.plan ->> 'denominator') AS s (type)
JOIN (
    SELECT experiment, min(started_at) AS first_at, max(coalesce(ended_at, 'infinity')) AS last_at
    FROM exp.experiment_phases GROUP BY experiment
) AS p ON p.experiment = e.key
WHERE s.type <> '';

-- Since when and until when a unit's events count in a phase; phases do not overlap, so an event counts at most once.
CREATE VIEW exp.exposed_units AS
SELECT a.experiment, a.phase, a.unit_type, a.unit_id, a.variant, greatest(a.assigned_at, p.started_at) AS from_at,
       coalesce(p.ended_at, 'infinity') AS to_at
FROM exp.assignments AS a JOIN exp.experiment_phases AS p USING (experiment, phase);

-- A number that can be summed, or null; beyond 1e100 the sum of squares would leave the range of a double.
CREATE FUNCTION exp.usable_number(value jsonb) RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN jsonb_typeof(value) = 'number' THEN CASE WHEN abs(value::numeric) <= 1e100 THEN value::numeric END END
$$;

-- The bucket of DDSketch (Masson, Rim, Lee, VLDB 2019) with a relative accuracy of 1 %: gamma = 1.01 / 0.99, nothing collapsed.
CREATE FUNCTION exp.sketch_key(value double precision) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN abs(value) < 1e-9 THEN '0'
                ELSE CASE WHEN value > 0 THEN '+' ELSE '-' END || ceil(ln(abs(value)) / ln(1.01::float8 / 0.99::float8))::bigint
           END
$$;

-- The value below which a share of the sketched values lies: the middle of its bucket, at most 1 % from each of its values.
CREATE FUNCTION exp.sketch_quantile(sketch jsonb, share double precision) RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT value FROM (
        SELECT value, sum(n) OVER (ORDER BY value) AS up_to, sum(n) OVER () AS total
        FROM (
            SELECT CASE WHEN key = '0' THEN 0 ELSE CASE WHEN left(key, 1) = '+' THEN 1.0 ELSE -1.0 END
                        * 2.0::float8 * (1.01::float8 / 0.99::float8) ^ substr(key, 2)::int / (1.01::float8 / 0.99::float8 + 1) END AS value,
                   n::bigint AS n
            FROM jsonb_each_text(sketch) AS bucket (key, n)
        ) AS buckets
    ) AS counted WHERE up_to > share * (total - 1) ORDER BY value LIMIT 1
$$;

CREATE FUNCTION exp.mark_events() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO exp.event_marks
        SELECT date_trunc('hour', event_at, 'UTC'), unit_type, type, min(received_at), max(received_at)
        FROM removed GROUP BY 1, 2, 3;
        INSERT INTO exp.unit_marks SELECT DISTINCT experiment, unit_id FROM removed JOIN exp.assignments USING (unit_type, unit_id);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO exp.event_marks
        SELECT date_trunc('hour', event_at, 'UTC'), unit_type, type, min(received_at), max(received_at)
        FROM added GROUP BY 1, 2, 3;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER events_are_marked AFTER INSERT ON exp.events
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION exp.mark_events();
CREATE TRIGGER changed_events_are_marked AFTER UPDATE ON exp.events
    REFERENCING OLD TABLE AS removed NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION exp.mark_events();
CREATE TRIGGER deleted_events_are_marked AFTER DELETE ON exp.events
    REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION exp.mark_events();

CREATE FUNCTION exp.mark_units() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO exp.unit_marks SELECT DISTINCT experiment, unit_id FROM changed;
    RETURN NULL;
END
$$;

CREATE TRIGGER assigned_units_are_marked AFTER INSERT ON exp.assignments
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION exp.mark_units();
CREATE TRIGGER forgotten_units_are_marked AFTER DELETE ON exp.assignments
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION exp.mark_units();

-- A phase may end earlier than events that were already counted in it.
CREATE FUNCTION exp.mark_phase() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO exp.phase_marks VALUES (NEW.experiment, NEW.ended_at);
    RETURN NULL;
END
$$;

CREATE TRIGGER ended_phase_is_marked AFTER UPDATE OF ended_at ON exp.experiment_phases
    FOR EACH ROW WHEN (NEW.ended_at IS NOT NULL) EXECUTE FUNCTION exp.mark_phase();
