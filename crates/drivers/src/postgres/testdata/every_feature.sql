-- A database that uses every feature a backup of PostgreSQL can lose. The tests load it with psql,
-- carry it through a backup and a restore, and compare what pg_dump says of both sides.
--
-- Roles are shared by a whole server: the tests replace `every_` by a prefix of their own. What a
-- version or a build lacks stands in a block that looks first.

\set ON_ERROR_STOP on
SET client_encoding = 'UTF8';
SET client_min_messages = warning;
SET check_function_bodies = true;

-- Roles: memberships, attributes, settings, limits, a role that nobody may log in as, odd names.
CREATE ROLE every_owner NOLOGIN;
CREATE ROLE every_reader NOLOGIN;
CREATE ROLE every_app LOGIN PASSWORD 'app secret' CONNECTION LIMIT 7 VALID UNTIL '2099-12-31 00:00:00+00' IN ROLE every_reader;
CREATE ROLE "every_ Odd-""Role""é" LOGIN NOINHERIT;
CREATE ROLE every_group NOLOGIN;
GRANT every_reader TO every_group WITH ADMIN OPTION;
GRANT every_group TO "every_ Odd-""Role""é" GRANTED BY postgres;
ALTER ROLE every_app SET statement_timeout = '5s';
ALTER ROLE every_app SET search_path = app, "Odd Schema", public;
COMMENT ON ROLE every_app IS 'the application''s role';

-- Schemas and names.
CREATE SCHEMA app AUTHORIZATION every_owner;
CREATE SCHEMA "Odd Schema";
CREATE SCHEMA "a/b%2F.c";
CREATE SCHEMA audit;
CREATE SCHEMA types;
CREATE SCHEMA empty_one;
COMMENT ON SCHEMA app IS E'with a line\nbreak, a ''quote'' and a \\ backslash';
GRANT USAGE ON SCHEMA app TO every_reader;
GRANT CREATE, USAGE ON SCHEMA "Odd Schema" TO every_app WITH GRANT OPTION;

-- Default privileges, for everybody and within one schema.
ALTER DEFAULT PRIVILEGES FOR ROLE every_owner IN SCHEMA app GRANT SELECT ON TABLES TO every_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE every_owner GRANT USAGE ON SEQUENCES TO every_app;
ALTER DEFAULT PRIVILEGES FOR ROLE every_owner REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
ALTER DEFAULT PRIVILEGES FOR ROLE every_owner GRANT USAGE ON TYPES TO every_group;

-- Extensions that the server has.
DO $$
DECLARE extension text;
BEGIN
    FOREACH extension IN ARRAY ARRAY['hstore', 'citext', 'ltree', 'pg_trgm', 'btree_gist', 'vector', 'unaccent', 'file_fdw', 'postgres_fdw'] LOOP
        IF EXISTS (SELECT FROM pg_available_extensions WHERE name = extension) THEN
            EXECUTE format('CREATE EXTENSION %I WITH SCHEMA %I', extension, CASE WHEN extension = 'citext' THEN 'types' ELSE 'public' END);
            EXECUTE format('COMMENT ON EXTENSION %I IS %L', extension, 'as found on this server');
        END IF;
    END LOOP;
END $$;

-- Types: enum with reordered values, domain, composite, range, shell that is completed.
CREATE TYPE types.mood AS ENUM ('sad', 'ok', 'it''s "fine"', 'happy');
ALTER TYPE types.mood ADD VALUE 'joyful' BEFORE 'ok';
CREATE DOMAIN types.positive AS integer CONSTRAINT above_zero CHECK (VALUE > 0);
CREATE DOMAIN types.short_text AS text COLLATE "C" DEFAULT 'x' NOT NULL CHECK (length(VALUE) < 20);
CREATE TYPE types.address AS (street text, number types.positive, tags text[], mood types.mood);
COMMENT ON TYPE types.address IS 'where somebody lives';
CREATE TYPE types.span AS RANGE (subtype = float8, subtype_diff = float8mi, multirange_type_name = types.spans);
ALTER TYPE types.mood OWNER TO every_owner;
GRANT USAGE ON TYPE types.positive TO every_app;
ALTER DOMAIN types.positive ADD CONSTRAINT not_seven CHECK (VALUE <> 7) NOT VALID;

-- Collations and text search.
DO $$
BEGIN
    CREATE COLLATION types.german_phonebook (provider = icu, locale = 'de-u-co-phonebk');
    CREATE COLLATION types.ignore_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
EXCEPTION WHEN feature_not_supported THEN NULL; -- Built without ICU.
END $$;
CREATE COLLATION types.plain FROM "C";
CREATE TEXT SEARCH DICTIONARY types.simple_english (TEMPLATE = pg_catalog.simple, STOPWORDS = english);
CREATE TEXT SEARCH CONFIGURATION types.search (COPY = pg_catalog.english);
ALTER TEXT SEARCH CONFIGURATION types.search ALTER MAPPING FOR word, asciiword WITH types.simple_english, english_stem;
COMMENT ON TEXT SEARCH CONFIGURATION types.search IS 'ours';

-- Functions, procedures, aggregates, operators, casts.
CREATE FUNCTION app.add_one(value integer) RETURNS integer LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE COST 3 AS 'SELECT value + 1';
CREATE FUNCTION app.standard_body(value integer) RETURNS integer LANGUAGE sql IMMUTABLE BEGIN ATOMIC SELECT app.add_one(value) * 2; END;
CREATE FUNCTION app."Odd ""name"""(VARIADIC "all" text[] DEFAULT ARRAY['$$', E'\\'], OUT total bigint) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $body$
BEGIN
    -- A comment with $$ and a ; in it.
    total := coalesce(array_length("all", 1), 0);
END $body$;
CREATE FUNCTION app.series(count integer) RETURNS TABLE (number integer, name text) LANGUAGE sql ROWS 50 AS 'SELECT g, ''n'' || g FROM pg_catalog.generate_series(1, count) g';
CREATE PROCEDURE app.nothing_much(INOUT value integer) LANGUAGE plpgsql AS $$ BEGIN value := value + 1; END $$;
CREATE FUNCTION app.longer(a text, b text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT CASE WHEN pg_catalog.length(b) > pg_catalog.length(a) THEN b ELSE a END';
CREATE AGGREGATE app.longest(text) (SFUNC = app.longer, STYPE = text, INITCOND = '', PARALLEL = SAFE);
CREATE FUNCTION app.nearly_equal(float8, float8) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_catalog.abs($1 - $2) < 1e-9';
CREATE OPERATOR app.=~= (LEFTARG = float8, RIGHTARG = float8, FUNCTION = app.nearly_equal, COMMUTATOR = OPERATOR(app.=~=));
CREATE FUNCTION types.address_text(types.address) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT ($1).street || '' '' || ($1).number';
CREATE CAST (types.address AS text) WITH FUNCTION types.address_text(types.address) AS ASSIGNMENT;
CREATE FUNCTION app.compare_absolute(integer, integer) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT pg_catalog.btint4cmp(pg_catalog.abs($1), pg_catalog.abs($2))';
CREATE FUNCTION app.absolute_less(integer, integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_catalog.abs($1) < pg_catalog.abs($2)';
CREATE FUNCTION app.absolute_less_equal(integer, integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_catalog.abs($1) <= pg_catalog.abs($2)';
CREATE FUNCTION app.absolute_equal(integer, integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_catalog.abs($1) = pg_catalog.abs($2)';
CREATE FUNCTION app.absolute_more_equal(integer, integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_catalog.abs($1) >= pg_catalog.abs($2)';
CREATE FUNCTION app.absolute_more(integer, integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_catalog.abs($1) > pg_catalog.abs($2)';
CREATE OPERATOR app.|<| (LEFTARG = integer, RIGHTARG = integer, FUNCTION = app.absolute_less);
CREATE OPERATOR app.|<=| (LEFTARG = integer, RIGHTARG = integer, FUNCTION = app.absolute_less_equal);
CREATE OPERATOR app.|=| (LEFTARG = integer, RIGHTARG = integer, FUNCTION = app.absolute_equal);
CREATE OPERATOR app.|>=| (LEFTARG = integer, RIGHTARG = integer, FUNCTION = app.absolute_more_equal);
CREATE OPERATOR app.|>| (LEFTARG = integer, RIGHTARG = integer, FUNCTION = app.absolute_more);
CREATE OPERATOR CLASS app.absolute_order FOR TYPE integer USING btree AS
    OPERATOR 1 app.|<|, OPERATOR 2 app.|<=|, OPERATOR 3 app.|=|, OPERATOR 4 app.|>=|, OPERATOR 5 app.|>|, FUNCTION 1 app.compare_absolute(integer, integer);
REVOKE EXECUTE ON FUNCTION app.add_one(integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION app.add_one(integer) TO every_app;
COMMENT ON FUNCTION app.add_one(integer) IS 'adds one';
ALTER FUNCTION app.series(integer) OWNER TO every_owner;

-- Every base type with its extreme values.
CREATE TABLE types.everything (
    id bigint GENERATED ALWAYS AS IDENTITY (START WITH 100 INCREMENT BY 10) PRIMARY KEY,
    small smallint, whole integer, big bigint, exact numeric, scaled numeric(30, 10), single real, double double precision,
    cash money, flag boolean, letter "char", fixed char(5), limited varchar(10), long text, identifier name,
    raw bytea, day date, clock time(6), clock_zone timetz, moment timestamp, moment_zone timestamptz, duration interval,
    host inet, network cidr, hardware macaddr, hardware8 macaddr8, bits bit(5), bits_varying bit varying, uuid uuid,
    document json, binary_document jsonb, path jsonpath, markup xml, search tsvector, query tsquery,
    a_point point, a_line line, a_segment lseg, a_box box, a_path path, a_polygon polygon, a_circle circle,
    whole_range int4range, exact_range numrange, time_range tstzrange, day_ranges datemultirange, own_range types.span, own_ranges types.spans,
    numbers integer[], matrix text[][], moods types.mood[], mood types.mood, domain types.positive, address types.address, addresses types.address[],
    log_position pg_lsn, snapshot pg_snapshot, transaction xid8, object oid, class regclass, kind regtype, function regprocedure, place tid, vector_old int2vector
);
INSERT INTO types.everything (small, whole, big, exact, scaled, single, double, cash, flag, letter, fixed, limited, long, identifier, raw, day, clock, clock_zone, moment, moment_zone, duration, host, network, hardware, hardware8, bits, bits_varying, uuid, document, binary_document, path, markup, search, query, a_point, a_line, a_segment, a_box, a_path, a_polygon, a_circle, whole_range, exact_range, time_range, day_ranges, own_range, own_ranges, numbers, matrix, moods, mood, domain, address, addresses, log_position, snapshot, transaction, object, class, kind, function, place, vector_old) VALUES
(-32768, -2147483648, -9223372036854775808, 'NaN', 12345678901234567890.0123456789, '-Infinity', '1e-307', '-92233720368547758.08', true, E'\\001', 'ab', E'\t', E'tab\there, new\nline, return\rback\bspace, \\. backslash-dot, \\N not null, quote '' " end', 'x', '\x00ff5c0a09', '-infinity', '24:00:00', '00:00:00+15:59:59', '-infinity', 'infinity', '-178000000 years 11 mons 3 days -04:05:06.789', '::ffff:1.2.3.4/128', '10.0.0.0/8', '08:00:2b:01:02:03', '08:00:2b:01:02:03:04:05', B'10101', B'', '00000000-0000-0000-0000-000000000000', '{"b":1, "a": [1, 2,  3], "a":"twice\u00e9"}', '{"n": 1e400, "u": "\u00e9\\", "nested": {"null": null}}', '$.a[*] ? (@ > 1)', NULL, 'a:1A b:2,3B ''it''''s''', 'a & !(b | c:*)', '(NaN,-0)', '{1,-1,0}', '[(0,0),(1,1)]', '(2,2),(1,1)', '[(0,0),(1,1)]', '((0,0),(1,1),(1,0))', '<(1,2),3>', '[1,10)', '(,0.1]', '[-infinity,infinity]', '{[2026-01-01,2026-02-01),[2026-03-01,)}', '(1.5,2.5]', '{[1,2),[3,4)}', '{1,NULL,3}', '{{a,"b,c"},{NULL,"\"q\\\\"}}', '{sad,"it''s \"fine\""}', 'joyful', 1, ROW('Main "Street", (back)', 3, ARRAY['x', NULL, ''], 'happy'), ARRAY[ROW('a', 1, NULL, NULL)::types.address, NULL], 'FFFFFFFF/FFFFFFFF', '10:20:10,14,15', '18446744073709551615', 4294967295, 'pg_class', 'types.mood', 'pg_catalog.abs(integer)', '(4294967295,65535)', '1 2 3'),
(32767, 2147483647, 9223372036854775807, '-Infinity', -0.0000000001, 'NaN', '-0', '92233720368547758.07', false, 'z', '', '', '', '', '', 'infinity', '00:00:00.000001', '23:59:59.999999-15:59:59', '294276-12-31 23:59:59.999999', '4713-01-01 00:00:00+00 BC', '178000000 years', '255.255.255.255', '::/0', 'ff:ff:ff:ff:ff:ff', NULL, B'00000', B'1', 'ffffffff-ffff-ffff-ffff-ffffffffffff', 'null', 'null', '$', NULL, '', '', '(1e300,Infinity)', '{0,1,0}', '[(1,1),(1,1)]', '(0,0),(0,0)', '((0,0))', '((0,0))', '<(0,0),0>', 'empty', '(,)', '(,)', '{}', 'empty', '{}', '{}', '{}', '{}', 'ok', NULL, ROW(NULL, NULL, NULL, NULL), '{}', '0/0', '1:1:', '0', 0, '-', 'integer', '-', '(0,0)', '');
INSERT INTO types.everything DEFAULT VALUES;
INSERT INTO types.everything (exact, long, raw) VALUES
    (('1' || repeat('0', 50000) || '.' || repeat('3', 2000))::numeric, repeat('x', 300000), decode(repeat('00ff', 100000), 'hex')),
    (1e-100, 'é ü ß 漢字 🦀 ' || chr(1) || chr(127) || chr(65533), convert_to('é', 'UTF8'));
DO $$
BEGIN
    UPDATE types.everything SET markup = '<a>&amp;é<b/></a>' WHERE id = 100;
EXCEPTION WHEN feature_not_supported THEN NULL; -- Built without libxml.
END $$;
COMMENT ON COLUMN types.everything.exact IS 'has NaN';
ALTER TABLE types.everything ALTER COLUMN long SET STORAGE EXTERNAL, ALTER COLUMN whole SET STATISTICS 500, ALTER COLUMN long SET (n_distinct = -0.5);

-- Types of extensions.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'hstore') THEN
        CREATE TABLE types.of_extensions (id integer, pairs hstore, word types.citext, tree ltree);
        INSERT INTO types.of_extensions VALUES (1, 'a=>1, "b c"=>NULL', 'WoRd', 'Top.Science'), (2, '', '', '');
        CREATE INDEX ON types.of_extensions USING gist (tree);
        CREATE INDEX trigrams ON types.of_extensions USING gin (CAST(word AS text) gin_trgm_ops);
    END IF;
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'vector') THEN
        CREATE TABLE types.embeddings (id integer, embedding vector(3));
        INSERT INTO types.embeddings SELECT g, ARRAY[g, g / 2.0, -g]::vector FROM generate_series(1, 100) g;
        CREATE INDEX ON types.embeddings USING hnsw (embedding vector_l2_ops);
    END IF;
END $$;

-- Tables of every kind: odd names, dropped columns, no columns, wide rows, unlogged, empty, storage options.
CREATE TABLE "Odd Schema"."Table "" with 'quotes', é, a.dot / and % " ("select" integer, "Column ""x""" text DEFAULT 'it''s', "ünïcode" text, "a.b" text);
INSERT INTO "Odd Schema"."Table "" with 'quotes', é, a.dot / and % " VALUES (1, NULL, '', E'\\N'), (2, 'NULL', '\', E'\\.');
CREATE TABLE "a/b%2F.c"."x/y%2F.z" (id integer PRIMARY KEY);
INSERT INTO "a/b%2F.c"."x/y%2F.z" SELECT generate_series(1, 10);
CREATE TABLE "Odd Schema"."ééééééééééééééééééééééééééééééé" (id integer);
INSERT INTO "Odd Schema"."ééééééééééééééééééééééééééééééé" VALUES (1);
CREATE TABLE "Odd Schema".".." (id integer);
INSERT INTO "Odd Schema".".." VALUES (2);
CREATE TABLE public."user" ("order" integer, "table" text);
INSERT INTO public."user" VALUES (1, 'keyword');
CREATE TABLE public.with_dropped (a integer, b text, c integer DEFAULT 5, d text);
INSERT INTO public.with_dropped SELECT g, 'b' || g, g, 'd' || g FROM generate_series(1, 50) g;
ALTER TABLE public.with_dropped DROP COLUMN b;
ALTER TABLE public.with_dropped ADD COLUMN e text DEFAULT 'added later' NOT NULL;
CREATE TABLE public.no_columns ();
INSERT INTO public.no_columns DEFAULT VALUES;
INSERT INTO public.no_columns DEFAULT VALUES;
CREATE TABLE public.all_dropped (a integer);
INSERT INTO public.all_dropped VALUES (1), (2), (3);
ALTER TABLE public.all_dropped DROP COLUMN a;
CREATE TABLE public.empty_table (id integer PRIMARY KEY, note text);
CREATE UNLOGGED TABLE public.unlogged_table (id integer, note text) WITH (fillfactor = 70, autovacuum_enabled = false);
INSERT INTO public.unlogged_table SELECT g, repeat('u', g) FROM generate_series(1, 100) g;
CREATE TABLE public.wide (id serial PRIMARY KEY, payload text, other bytea) WITH (toast_tuple_target = 256);
INSERT INTO public.wide (payload, other) SELECT string_agg(md5(g::text || s::text), ''), decode(string_agg(md5(s::text || g::text), ''), 'hex') FROM generate_series(1, 20) g, generate_series(1, 3000) s GROUP BY g;
CREATE TABLE public.typed OF types.address (number WITH OPTIONS DEFAULT 1);
INSERT INTO public.typed VALUES ('s', 2, '{}', 'ok');
CREATE TEMPORARY TABLE forgotten AS SELECT 1 AS a;
CREATE TABLE app.with_limits (id integer CONSTRAINT positive_id CHECK (id > 0), other integer, CONSTRAINT no_inherit_check CHECK (other > 0) NO INHERIT, EXCLUDE USING btree (id WITH =));
INSERT INTO app.with_limits VALUES (1, 1), (2, NULL);

-- Generated columns.
CREATE TABLE app.generated (
    net numeric(10, 2), rate numeric(4, 2) DEFAULT 19, gross numeric(12, 2) GENERATED ALWAYS AS (net * (1 + rate / 100)) STORED,
    doubled integer GENERATED ALWAYS AS (app.standard_body(7)) STORED
);
INSERT INTO app.generated (net) SELECT g * 1.11 FROM generate_series(1, 200) g;
CREATE TABLE app.only_generated (a integer GENERATED ALWAYS AS (42) STORED);
INSERT INTO app.only_generated DEFAULT VALUES;
DO $$
BEGIN
    IF current_setting('server_version_num')::integer >= 180000 THEN
        EXECUTE 'CREATE TABLE app.virtual_columns (id integer PRIMARY KEY, squared integer GENERATED ALWAYS AS (id * id) VIRTUAL, note text CONSTRAINT note_there NOT NULL, during tstzrange)';
        EXECUTE 'INSERT INTO app.virtual_columns (id, note) SELECT g, ''n'' FROM generate_series(1, 20) g';
        EXECUTE 'ALTER TABLE app.virtual_columns ADD CONSTRAINT during_there NOT NULL during NOT VALID';
        EXECUTE 'CREATE TABLE app.temporal (id int4range, valid daterange, PRIMARY KEY (id, valid WITHOUT OVERLAPS))';
        EXECUTE 'INSERT INTO app.temporal VALUES (''[1,2)'', ''[2026-01-01,2026-02-01)''), (''[1,2)'', ''[2026-02-01,)'')';
        EXECUTE 'CREATE TABLE app.not_enforced (id integer, CONSTRAINT wish CHECK (id > 100) NOT ENFORCED)';
        EXECUTE 'INSERT INTO app.not_enforced VALUES (1)';
    END IF;
END $$;

-- Sequences: owned, unowned, identity by default, descending, cycling, never called, of another type.
CREATE SEQUENCE app.free_one START 42;
SELECT nextval('app.free_one'), nextval('app.free_one');
CREATE SEQUENCE app.downwards INCREMENT BY -3 MINVALUE -100 MAXVALUE 10 START 10 CYCLE;
SELECT nextval('app.downwards'), nextval('app.downwards');
CREATE SEQUENCE app.never_called AS smallint START 7 CACHE 20;
CREATE SEQUENCE app."odd ' Seq""é" MAXVALUE 9223372036854775807;
SELECT setval('app."odd '' Seq""é"', 9223372036854775807, true);
CREATE UNLOGGED SEQUENCE app.unlogged_one;
SELECT nextval('app.unlogged_one');
CREATE TABLE app.by_default (id integer GENERATED BY DEFAULT AS IDENTITY (MINVALUE -5 START WITH -5), note text);
INSERT INTO app.by_default (note) VALUES ('a'), ('b');
INSERT INTO app.by_default VALUES (1000, 'own number');
CREATE TABLE app.borrowed (id bigint DEFAULT nextval('app.free_one'), small smallserial);
INSERT INTO app.borrowed DEFAULT VALUES;
ALTER SEQUENCE app.free_one OWNED BY app.borrowed.id;
GRANT USAGE, SELECT ON SEQUENCE app.downwards TO every_app;

-- Partitions: list over range over hash, default, one in another schema, one with an index of its own, detached columns order.
CREATE TABLE app.events (id bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL, kind text NOT NULL, body jsonb, PRIMARY KEY (id, at, kind)) PARTITION BY LIST (kind);
CREATE TABLE app.events_clicks PARTITION OF app.events FOR VALUES IN ('click', 'tap') PARTITION BY RANGE (at);
CREATE TABLE app.events_clicks_2025 PARTITION OF app.events_clicks FOR VALUES FROM ('2025-01-01 00:00:00+00') TO ('2026-01-01 00:00:00+00');
CREATE TABLE app.events_clicks_2026 PARTITION OF app.events_clicks FOR VALUES FROM ('2026-01-01 00:00:00+00') TO (MAXVALUE) PARTITION BY HASH (id);
CREATE TABLE app.events_clicks_2026_0 PARTITION OF app.events_clicks_2026 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE "Odd Schema"."events clicks 2026 1" PARTITION OF app.events_clicks_2026 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE app.events_other PARTITION OF app.events DEFAULT;
CREATE TABLE app.events_views (kind text NOT NULL, extra_dropped integer, body jsonb, at timestamptz NOT NULL, id bigint NOT NULL);
ALTER TABLE app.events_views DROP COLUMN extra_dropped;
ALTER TABLE app.events ATTACH PARTITION app.events_views FOR VALUES IN ('view');
CREATE INDEX events_by_time ON app.events (at DESC NULLS LAST) INCLUDE (kind);
CREATE INDEX ON ONLY app.events (kind text_pattern_ops);
CREATE INDEX only_here ON app.events_other USING gin (body jsonb_path_ops);
INSERT INTO app.events (at, kind, body) SELECT '2025-11-01 00:00:00+00'::timestamptz + g * interval '3 hours', (ARRAY['click', 'tap', 'view', 'buy'])[g % 4 + 1], jsonb_build_object('n', g) FROM generate_series(1, 2000) g;
CREATE TABLE app.mood_events (id integer, mood types.mood) PARTITION BY HASH (mood);
CREATE TABLE app.mood_events_0 PARTITION OF app.mood_events FOR VALUES WITH (MODULUS 3, REMAINDER 0);
CREATE TABLE app.mood_events_1 PARTITION OF app.mood_events FOR VALUES WITH (MODULUS 3, REMAINDER 1);
CREATE TABLE app.mood_events_2 PARTITION OF app.mood_events FOR VALUES WITH (MODULUS 3, REMAINDER 2);
INSERT INTO app.mood_events SELECT g, (enum_range(NULL::types.mood))[g % 5 + 1] FROM generate_series(1, 100) g;

-- Inheritance.
CREATE TABLE app.animals (id integer PRIMARY KEY, name text NOT NULL, legs integer DEFAULT 4 CHECK (legs >= 0));
CREATE TABLE app.birds (wings integer, legs integer DEFAULT 2) INHERITS (app.animals);
CREATE TABLE app.named (name text);
CREATE TABLE app.pets (owner text) INHERITS (app.animals, app.named);
INSERT INTO app.animals VALUES (1, 'snake', 0);
INSERT INTO app.birds VALUES (2, 'owl', 2, 2);
INSERT INTO app.pets VALUES (3, 'cat', 4, 'me');

-- Foreign keys: circular, self, deferrable, not valid, to a partitioned table, with actions, several columns.
CREATE TABLE app.people (id integer PRIMARY KEY, boss integer REFERENCES app.people ON DELETE SET NULL, team integer);
CREATE TABLE app.teams (id integer PRIMARY KEY, lead integer NOT NULL REFERENCES app.people DEFERRABLE INITIALLY DEFERRED);
ALTER TABLE app.people ADD CONSTRAINT people_team FOREIGN KEY (team) REFERENCES app.teams ON UPDATE CASCADE DEFERRABLE;
INSERT INTO app.people SELECT g, NULLIF(g - 1, 0), NULL FROM generate_series(1, 100) g;
INSERT INTO app.teams VALUES (1, 1), (2, 50);
UPDATE app.people SET team = id % 2 + 1;
CREATE TABLE app.event_notes (event bigint, at timestamptz, kind text, note text, FOREIGN KEY (event, at, kind) REFERENCES app.events MATCH FULL ON DELETE CASCADE);
INSERT INTO app.event_notes SELECT id, at, kind, 'note' FROM app.events WHERE id % 100 = 0;
CREATE TABLE app.doubtful (person integer, amount integer);
INSERT INTO app.doubtful VALUES (1, -1), (99999, 1);
ALTER TABLE app.doubtful ADD CONSTRAINT person_there FOREIGN KEY (person) REFERENCES app.people NOT VALID, ADD CONSTRAINT amount_positive CHECK (amount > 0) NOT VALID;
COMMENT ON CONSTRAINT person_there ON app.doubtful IS 'never checked';

-- Indexes of every kind; clustered; replica identity; exclusion; nulls not distinct; statistics objects.
CREATE TABLE app.indexed (id integer NOT NULL, code text NOT NULL, amount integer, words tsvector, during int4range, tags text[], place point, at timestamptz);
INSERT INTO app.indexed SELECT g, 'code' || g, g % 17 - 8, to_tsvector('english', 'word' || g || ' running'), int4range(g * 10, g * 10 + 10), ARRAY['t' || g % 5], point(g, -g), '2026-01-01 00:00:00+00'::timestamptz + g * interval '1 minute' FROM generate_series(1, 1000) g;
CREATE UNIQUE INDEX indexed_id ON app.indexed (id) INCLUDE (code);
CREATE UNIQUE INDEX indexed_lower ON app.indexed (lower(code) COLLATE "C" DESC) WHERE id > 10;
CREATE INDEX indexed_expression ON app.indexed ((app.add_one(amount)), (id % 3)) WITH (fillfactor = 80);
ALTER INDEX app.indexed_expression ALTER COLUMN 1 SET STATISTICS 300;
CREATE INDEX ON app.indexed USING gin (words);
CREATE INDEX ON app.indexed USING gin (tags) WITH (fastupdate = off);
CREATE INDEX ON app.indexed USING gist (place);
CREATE INDEX ON app.indexed USING spgist (code);
CREATE INDEX ON app.indexed USING brin (at) WITH (pages_per_range = 8, autosummarize = on);
CREATE INDEX ON app.indexed USING hash (code);
CREATE INDEX indexed_absolute ON app.indexed (amount app.absolute_order);
ALTER TABLE app.indexed ADD CONSTRAINT no_overlap EXCLUDE USING gist (during WITH &&) WHERE (id < 900) DEFERRABLE;
ALTER TABLE app.indexed ADD CONSTRAINT indexed_by_constraint UNIQUE USING INDEX indexed_id;
ALTER TABLE app.indexed CLUSTER ON indexed_by_constraint;
ALTER TABLE app.indexed REPLICA IDENTITY USING INDEX indexed_by_constraint;
ALTER TABLE app.doubtful REPLICA IDENTITY FULL;
ALTER TABLE app.teams REPLICA IDENTITY NOTHING;
CREATE TABLE app.nulls (a integer, b integer, UNIQUE NULLS NOT DISTINCT (a, b));
INSERT INTO app.nulls VALUES (1, NULL), (NULL, NULL);
CREATE STATISTICS app.related (ndistinct, dependencies, mcv) ON amount, id FROM app.indexed;
CREATE STATISTICS app.expression_statistics ON (lower(code)), (id % 7) FROM app.indexed;
ALTER STATISTICS app.related SET STATISTICS 200;
COMMENT ON STATISTICS app.related IS 'they go together';
COMMENT ON INDEX app.indexed_absolute IS 'by absolute value';

-- Triggers in every state, rules, event triggers.
CREATE TABLE audit.log (id bigserial PRIMARY KEY, what text);
CREATE FUNCTION audit.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audit.log (what) VALUES (TG_NAME || ' ' || TG_OP); RETURN NEW; END $$;
CREATE FUNCTION audit.changes() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audit.log (what) SELECT 'changed ' || count(*) FROM new_rows; RETURN NULL; END $$;
CREATE TABLE app.watched (id integer PRIMARY KEY, value text);
CREATE TRIGGER normal AFTER INSERT OR UPDATE OF value ON app.watched FOR EACH ROW WHEN (NEW.id > 0) EXECUTE FUNCTION audit.note();
CREATE TRIGGER switched_off BEFORE INSERT ON app.watched FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER for_replica BEFORE INSERT ON app.watched FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER every_time BEFORE INSERT ON app.watched FOR EACH ROW EXECUTE FUNCTION audit.note();
CREATE TRIGGER with_table AFTER INSERT ON app.watched REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION audit.changes();
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON app.watched DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION audit.note();
ALTER TABLE app.watched DISABLE TRIGGER switched_off, ENABLE REPLICA TRIGGER for_replica, ENABLE ALWAYS TRIGGER every_time;
INSERT INTO app.watched SELECT g, 'v' || g FROM generate_series(1, 10) g;
COMMENT ON TRIGGER normal ON app.watched IS 'notes';
CREATE TRIGGER on_partitions AFTER INSERT ON app.events FOR EACH ROW WHEN (NEW.kind = 'never') EXECUTE FUNCTION audit.note();
ALTER TABLE app.events_views DISABLE TRIGGER on_partitions;
CREATE RULE no_delete AS ON DELETE TO app.watched DO INSTEAD NOTHING;
CREATE RULE note_update AS ON UPDATE TO app.doubtful WHERE NEW.amount > 100 DO ALSO INSERT INTO audit.log (what) VALUES ('rule');
ALTER TABLE app.watched DISABLE RULE no_delete;
CREATE FUNCTION audit.ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audit.log (what) VALUES ('ddl ' || tg_tag); END $$;

-- Views: barrier, check option, recursive, updatable with a trigger, of another owner; materialized ones that build on each other.
CREATE VIEW app.recent WITH (security_barrier) AS SELECT id, at, kind FROM app.events WHERE at > '2026-06-01 00:00:00+00';
CREATE VIEW app.positive AS SELECT * FROM app.doubtful WHERE amount > 0 WITH LOCAL CHECK OPTION;
CREATE RECURSIVE VIEW app.chain (id, depth) AS SELECT id, 0 FROM app.people WHERE boss IS NULL UNION ALL SELECT p.id, c.depth + 1 FROM app.people p JOIN chain c ON p.boss = c.id;
CREATE VIEW app.invoker WITH (security_invoker = true) AS SELECT count(*) AS total FROM app.people;
CREATE VIEW "Odd Schema"."view é" ("odd "" column") AS SELECT "select" FROM "Odd Schema"."Table "" with 'quotes', é, a.dot / and % ";
CREATE FUNCTION audit.instead() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE TRIGGER instead INSTEAD OF INSERT ON app.recent FOR EACH ROW EXECUTE FUNCTION audit.instead();
CREATE MATERIALIZED VIEW app.z_by_kind AS SELECT kind, count(*) AS total, max(at) AS last FROM app.events GROUP BY kind;
CREATE UNIQUE INDEX ON app.z_by_kind (kind);
CREATE MATERIALIZED VIEW app.a_on_top AS SELECT sum(total) AS total FROM app.z_by_kind;
CREATE VIEW app.between AS SELECT total * 2 AS twice FROM app.a_on_top;
CREATE MATERIALIZED VIEW app."A top é" AS SELECT twice FROM app.between WITH DATA;
CREATE MATERIALIZED VIEW app.never_filled AS SELECT * FROM app.people WITH NO DATA;
ALTER MATERIALIZED VIEW app.a_on_top OWNER TO every_owner;
GRANT SELECT ON app.z_by_kind TO every_owner;
GRANT USAGE ON SCHEMA app TO every_owner;
COMMENT ON MATERIALIZED VIEW app.z_by_kind IS 'counts';

-- Row security; grants on everything, by column too.
ALTER TABLE app.people ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own_team ON app.people FOR SELECT TO every_app USING (team = 1);
CREATE POLICY strict ON app.people AS RESTRICTIVE FOR UPDATE USING (true) WITH CHECK (id > 0);
COMMENT ON POLICY own_team ON app.people IS 'only theirs';
GRANT SELECT (id, team), UPDATE (team) ON app.people TO every_app;
GRANT ALL ON app.teams TO every_app WITH GRANT OPTION;
REVOKE ALL ON app.watched FROM PUBLIC;
GRANT INSERT ON app.watched TO PUBLIC;
ALTER TABLE app.watched OWNER TO every_owner;
ALTER TABLE app.teams OWNER TO "every_ Odd-""Role""é";
SET SESSION AUTHORIZATION every_owner;
CREATE TABLE app.by_owner (id serial, note text);
GRANT SELECT ON app.by_owner TO every_app;
INSERT INTO app.by_owner (note) VALUES ('made by the owner');
RESET SESSION AUTHORIZATION;

-- Foreign data: their definitions come along, their rows do not.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'postgres_fdw') THEN
        CREATE SERVER elsewhere VERSION '1' FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '127.0.0.1', port '1', dbname 'it''s');
        CREATE USER MAPPING FOR every_app SERVER elsewhere OPTIONS (user 'u', password 'p');
        CREATE USER MAPPING FOR PUBLIC SERVER elsewhere OPTIONS (user 'anybody', password_required 'false');
        CREATE FOREIGN TABLE app.far_away (id integer OPTIONS (column_name 'ID') NOT NULL, note text) SERVER elsewhere OPTIONS (table_name 't');
        CREATE TABLE app.by_region (region text, amount integer) PARTITION BY LIST (region);
        CREATE TABLE app.by_region_near PARTITION OF app.by_region FOR VALUES IN ('near');
        CREATE FOREIGN TABLE app.by_region_far PARTITION OF app.by_region FOR VALUES IN ('far') SERVER elsewhere;
        INSERT INTO app.by_region VALUES ('near', 1), ('near', 2);
        GRANT USAGE ON FOREIGN SERVER elsewhere TO every_app;
        GRANT SELECT ON app.far_away TO every_app;
        COMMENT ON SERVER elsewhere IS 'not here';
    END IF;
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'file_fdw') THEN
        CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
        CREATE FOREIGN TABLE app.a_file (line text) SERVER files OPTIONS (filename '/nowhere/file', format 'text');
    END IF;
END $$;
CREATE FOREIGN DATA WRAPPER nothing_behind OPTIONS (debug 'true');

-- Publications and a subscription that is switched off.
CREATE PUBLICATION everything FOR ALL TABLES WITH (publish = 'insert, update');
CREATE PUBLICATION filtered FOR TABLE app.indexed (id, code, amount) WHERE (id > 5), TABLE ONLY app.animals WITH (publish_via_partition_root = true);
CREATE PUBLICATION of_schema FOR TABLES IN SCHEMA audit;
COMMENT ON PUBLICATION filtered IS 'some';
CREATE SUBSCRIPTION every_sub CONNECTION 'host=127.0.0.1 port=1 dbname=x' PUBLICATION everything WITH (connect = false, enabled = false, create_slot = false, slot_name = NONE);

-- Large objects, with comment, owner and grants; one with more than a page and a hole, one empty.
SELECT lo_from_bytea(0, decode(repeat('00ff10', 5000), 'hex')) AS many_pages \gset
SELECT lo_create(0) AS nothing_in_it \gset
SELECT lo_create(0) AS with_hole \gset
SELECT lo_put(:with_hole, 100000, '\x01');
COMMENT ON LARGE OBJECT :many_pages IS 'three bytes, often';
ALTER LARGE OBJECT :many_pages OWNER TO every_owner;
GRANT SELECT ON LARGE OBJECT :many_pages TO every_reader;
GRANT ALL ON LARGE OBJECT :nothing_in_it TO every_app;

-- Database level: settings for everybody and for one role in this database, comment, grants, limit.
SELECT format('ALTER DATABASE %I SET work_mem = %L', current_database(), '7MB') \gexec
SELECT format('ALTER DATABASE %I SET search_path = "$user", app, public', current_database()) \gexec
SELECT format('ALTER ROLE every_app IN DATABASE %I SET lock_timeout = %L', current_database(), '3s') \gexec
SELECT format('COMMENT ON DATABASE %I IS %L', current_database(), 'everything in it, it''s a lot') \gexec
SELECT format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO every_app', current_database()) \gexec
SELECT format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database()) \gexec
SELECT format('ALTER DATABASE %I CONNECTION LIMIT 55', current_database()) \gexec
SELECT format('ALTER DATABASE %I OWNER TO every_owner', current_database()) \gexec

-- Event triggers come last: they act on everything above.
CREATE EVENT TRIGGER note_ddl ON ddl_command_end WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE', 'CREATE INDEX', 'REFRESH MATERIALIZED VIEW') EXECUTE FUNCTION audit.ddl();
CREATE EVENT TRIGGER sleeping ON sql_drop EXECUTE FUNCTION audit.ddl();
ALTER EVENT TRIGGER sleeping DISABLE;
CREATE EVENT TRIGGER always_there ON ddl_command_start WHEN TAG IN ('DROP TABLE') EXECUTE FUNCTION audit.ddl();
ALTER EVENT TRIGGER always_there ENABLE ALWAYS;
